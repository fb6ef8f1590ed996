"""Chat templates: Jinja that loops, nests, counts too far, reaches for code, or says something else than asked."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from megatron_vlm.data.sample import Sample, Turn
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.fuzz import hostile
from tests.fuzz.kind import Kind, Read
from tests.helpers.models.foreign_models import tree
from tests.helpers.models.tiny import tiny_tokenizer

EXPRESSIONS = (
    "1/0",
    "1 % 0",
    "2.0**100000",
    "10**(10**9)",
    "'a'*10**10",
    "'a'*10**7",
    "[0]*10**10",
    "range(10**9)",
    "range(99999)|list",
    "(range(99999)|list)*1000",
    "'%999999999d'|format(1)",
    "'{:>9999999999}'.format(1)",
    "'a'.center(10**10)",
    "'a'|center(10**9)",
    "'x'.ljust(10**10)",
    "messages|tojson",
    "messages * 10**9",
    "messages.__class__.__mro__",
    "''.__class__.__base__.__subclasses__()",
    "cycler.__init__.__globals__.os.system('x')",
    "lipsum.__globals__['os'].popen('x')",
    "self._TemplateReference__context",
    "raise_exception('\x1b[2J no')",
    "raise_exception('a\nb')",
    "raise_exception(messages)",
    "strftime_now('%Y' * 10**8)",
    "strftime_now('\\x00')",
    "undefined.a.b",
    "messages[99].content",
    "messages[0]['content'][10**30]",
    "messages|map('nope')|list",
    "messages|groupby('role')|list",
    "messages|sum",
    "'a' < 1",
    "'é😀'|urlencode",
    "'<image>' * 3",
    "'\ud800'",
    "''.join(['a'*10**6]*10**6)",
    "'a'.encode('utf-16').decode('latin-1')",
    "('a'*10**6).replace('a', 'b'*10**6)",
    "namespace(a=1).a",
    "range(3).__len__()",
    "9**9**9",
    "(9**9999)|string",
    "9**9999",
    "messages[0].content|wordwrap(1)",
    "dict(a=1).items()|list",
)
STATEMENTS = (
    "{%% for i in range(99999) %%}{%% for j in range(99999) %%}%s{%% endfor %%}{%% endfor %%}",
    "{%% for i in range(99999) %%}%s{%% endfor %%}",
    "{%% macro f() %%}{{ f() }}%s{%% endmacro %%}{{ f() }}",
    "{%% macro f(n) %%}{%% for i in range(9) %%}{{ f(n + 1) }}{%% endfor %%}%s{%% endmacro %%}{{ f(0) }}",
    "{%% set ns = namespace(x='a') %%}{%% for i in range(60) %%}{%% set ns.x = ns.x * 2 %%}{%% endfor %%}%s{{ ns.x }}",
    "{%% set ns = namespace(x=2) %%}{%% for i in range(40) %%}{%% set ns.x = ns.x * ns.x %%}{%% endfor %%}%s{{ ns.x }}",
    "{%% include 'x' %%}%s",
    "{%% import '/etc/passwd' as x %%}%s",
    "{%% extends x %%}%s",
    "{%% if %s %%}",
    "{%% break %%}%s",
    "{%% for m in messages recursive %%}{{ loop(messages) }}%s{%% endfor %%}",
    "{%% generation %%}%s{%% endgeneration %%}",
    "{%% set x = %s %%}",
    "{%% call(x) f() %%}%s{%% endcall %%}",
    "{%% filter upper %%}%s{%% endfilter %%}",
    "{# %s",
    "%s{{",
    "%s" + "(" * 500,
    "{{ " + "(" * 3_000 + "%s",
    "{{ " + "-" * 3_000 + "1 }}%s",
    "{{ " + "[" * 100 + "%s",
    "{%% if a %%}" * 300 + "%s",
    "{{ 'a'" + " ~ 'a'" * 3_000 + " }}%s",
)
SAMPLES = (
    [("user", "<image>\nWhat is this?"), ("assistant", "a red square")],
    [("system", "be brief"), ("user", "<image>?"), ("assistant", "yes"), ("user", "no?"), ("assistant", " no ")],
)


@dataclass(frozen=True)
class Base:
    """A good tokenizer's files and its template."""

    files: dict[str, bytes]
    template: str


def prepare(folder: Path) -> Base:
    tokenizer = load_tokenizer(tiny_tokenizer(folder), "<image>")
    assert tokenizer.chat_template
    return Base(tree(folder / "tokenizer"), tokenizer.chat_template)


def make(random: Random, base: Base, folder: Path) -> Read:
    for name, data in base.files.items():
        (folder / name).write_bytes(data)
    template = _template(random, base.template)
    settings = json.loads(base.files["tokenizer_config.json"])
    settings.pop("chat_template", None)
    place = random.randrange(8)
    if place < 5:
        settings["chat_template"] = template
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    elif place == 5:
        (folder / "chat_template.jinja").write_bytes(template.encode("utf-8", "surrogatepass"))
    elif place == 6:
        settings["chat_template"] = [{"name": random.choice(("default", "tool_use", "\x1b")), "template": template}]
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    elif random.random() < 0.5:
        settings["chat_template"] = hostile.value(random)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    else:
        name = random.choice(("chat_template.jinja", "additional_chat_templates/a.jinja"))
        hostile.in_its_place(random, folder / name)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    turns = tuple(Turn(role, text) for role, text in random.choice(SAMPLES))  # type: ignore[arg-type]
    return lambda: _read(folder, Sample("a", turns, ("a.png",), "train.json element 0"))


def _read(folder: Path, sample: Sample) -> None:
    encoder = ConversationEncoder(load_tokenizer(folder, "<image>"), "auto", "<image>", 16)
    encoder.encode(sample)
    encoder.encode_prompt(sample)
    encoder.find_turn_ends()


def _template(random: Random, good: str) -> str:
    kind = random.randrange(8)
    expression = random.choice(EXPRESSIONS)
    if kind < 3:
        return good + "{{ " + expression + " }}"
    if kind < 5:
        return random.choice(("", good)) + random.choice(STATEMENTS) % random.choice(("x", "{{ " + expression + " }}"))
    if kind == 5:  # where the answer stands
        return good.replace("message['content']", f"({expression})", 1).replace("message.content", f"({expression})", 1)
    if kind == 6:
        place = random.randrange(len(good))
        piece = random.choice((hostile.text(random), "{{", "}}", "{%", "%}", "{#", "not ", "|upper", "|length", ""))
        return good[:place] + piece + good[place + random.choice((0, 1, 4, 30)) :]
    return hostile.text(random)


TEMPLATES = Kind("template", 400, prepare, make)
