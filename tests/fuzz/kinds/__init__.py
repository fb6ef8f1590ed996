"""All kinds of input. Importing this imports all that is read through, which takes seconds."""

from tests.fuzz.kind import Kind
from tests.fuzz.kinds.checkpoints import CHECKPOINTS, MANIFESTS
from tests.fuzz.kinds.configs import CONFIGS
from tests.fuzz.kinds.images import IMAGES
from tests.fuzz.kinds.recipes import RECIPES
from tests.fuzz.kinds.records import CHATS, RECORDS
from tests.fuzz.kinds.templates import TEMPLATES
from tests.fuzz.kinds.tokenizers import TOKENIZERS
from tests.fuzz.kinds.videos import VIDEOS
from tests.fuzz.kinds.weights import WEIGHTS

ALL = (RECIPES, RECORDS, CHATS, IMAGES, VIDEOS, TEMPLATES, TOKENIZERS, CONFIGS, CHECKPOINTS, MANIFESTS, WEIGHTS)
KINDS: dict[str, Kind] = {kind.name: kind for kind in ALL}


def warm_up() -> None:
    """Chooses the device, and quiets libraries as every tool does."""
    from transformers.utils.logging import disable_progress_bar

    from megatron_vlm.runtime.device import prepare
    from megatron_vlm.runtime.logging import quiet_libraries

    prepare("cpu")
    quiet_libraries()
    disable_progress_bar()
