"""The strings conversations become: the tokenizer's own chat template, or one of those the field knows by name.

The named ones give LLaVA's and VILA's strings, character by character, with these differences:

- a sample's own system turn takes the place of the template's system text (there it is dropped);
- `plain` keeps a marker for every image (there one, however many images the sample has);
- an empty answer still gets its end (there it and its end are left out, and the model never learns to say nothing);
- what is trained are the tokens behind those of the prompt (`conversation.py`). LLaVA adds up lengths of separately
  tokenised parts, and trains nothing of a sample where the sum is off by one ("tokenization mismatch").

Kept as it is: `llama_3` ends the last answer with <|end_of_text|> and every earlier one with <|eot_id|>, as VILA's
weights learnt it. Both end an answer in generation (`ConversationEncoder.find_turn_ends`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.chat_template import ChatTemplate
from megatron_vlm.data.text.jinja import LLAMA_3_JINJA, PLAIN_JINJA, VICUNA_JINJA
from megatron_vlm.registry import Registry

Render = Callable[[Sequence[Turn], PreTrainedTokenizerBase, bool], str]


@dataclass(frozen=True)
class Template:
    """One way to write conversations down.

    Args:
        render: (turns, tokenizer, whether the model is to speak next) -> text; raises any exception for turns it
            refuses.
        needs: tokens of its own that the tokenizer must know as special ones.
        begins: the tokenizer's begin-of-sequence token, where it has one, comes before the text. It is put there as an
            id: behind a token in the text, some tokenizers cut the first word another way.
        captions: of a question nothing but its image markers is kept; a sample is one question and one answer.
        jinja: the same as a chat template over texts, without the begin-of-sequence token, for those who cannot call
            `render` (exported models). `IMAGE` in it stands for the image marker as a string. None: there is none, or
            it is the tokenizer's.
    """

    render: Render
    needs: tuple[str, ...] = ()
    begins: bool = False
    captions: bool = False
    jinja: str | None = None


TEMPLATES: Registry[Template] = Registry("template")


def render_chat_template(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, generation_prompt: bool) -> str:
    """`auto`: the tokenizer's own chat template, without arguments. Raises as `ChatTemplate`."""
    return ChatTemplate(tokenizer, {}).render(turns, generation_prompt)


def render_plain(turns: Sequence[Turn], _: PreTrainedTokenizerBase, __: bool) -> str:
    """`<image>caption\\n`."""
    return "".join(turn.text + ("\n" if turn.role == "assistant" else "") for turn in turns)


def render_program(program: str, turns: Sequence[Turn], _: PreTrainedTokenizerBase, generation_prompt: bool) -> str:
    """A named template's own program (`jinja`), which exported models carry too."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    texts, _ = render_jinja_template([messages], chat_template=program, add_generation_prompt=generation_prompt)
    return str(texts[0])


def _of_program(program: str, **options: Any) -> Template:
    return Template(partial(render_program, program), jinja=program, **options)


TEMPLATES.register("auto")(Template(render_chat_template))
TEMPLATES.register("plain")(Template(render_plain, begins=True, captions=True, jinja=PLAIN_JINJA))
TEMPLATES.register("vicuna_v1")(_of_program(VICUNA_JINJA, needs=("</s>",), begins=True))
TEMPLATES.register("llama_3")(
    _of_program(
        LLAMA_3_JINJA,
        needs=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
    )
)
