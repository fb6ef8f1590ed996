"""Every rule: a recipe that breaks it, named with key, value found and values allowed, and one that just keeps it."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_vlm.config import Config, names_its_model, packages, trains, validate
from megatron_vlm.config.rules import validate_layout
from megatron_vlm.errors import ConfigError
from tests.unit.config.recipes import FACTS, facts, recipe

BROKEN: list[tuple[str, dict[str, Any], int, list[str]]] = [
    ("no source", {"model__vision": {}}, 1, ["model.vision: found neither path nor config, needs exactly one"]),
    ("two sources", {"model__language__path": "here"}, 1, ["model.language: found both path 'here' and config"]),
    ("no tokenizer", {"model__language__tokenizer": None}, 1, ["model.language.tokenizer: found null"]),
    ("sequence alone", {"parallel__sequence": True}, 1, ["parallel.sequence: found true with parallel.tensor 1"]),
    (
        "world with context ranks",
        {"parallel__ring": 2, "parallel__ulysses": 2, "training__sequence_length": 128},
        6,
        [
            "parallel.tensor * parallel.pipeline * parallel.ulysses * parallel.ring: found 1 * 1 * 2 * 2 = 4, "
            "the world size 6 allows 1, 2, 3, 6, or start a multiple of 4 ranks"
        ],
    ),
    (
        "a split chosen and given",
        {"parallel": {"context": 4, "ring": 2, "ulysses": 2}},
        4,
        ["parallel.context: found 4 with parallel.ulysses 2 and parallel.ring 2, which it sets itself"],
    ),
    (
        "world with a split to be chosen",
        {"parallel__context": 4},
        6,
        ["parallel.tensor * parallel.pipeline * parallel.context: found 1 * 1 * 4 = 4, the world size 6 allows 1, 2"],
    ),
    (
        "cudnn and cut documents",
        {"parallel__ring": 2, "data__packing": True, "ops__attention": "cudnn"},
        2,
        ["ops.attention: found cudnn with parallel.ring 2 and data.packing rows, where a rank's part of a document"],
    ),
    (
        "cudnn and gathered keys",
        {"parallel": {"ring": 2, "ring_mode": "all_gather"}, "ops__attention": "cudnn"},
        2,
        ["ops.attention: found cudnn with parallel.ring 2 and parallel.ring_mode all_gather, where a rank's queries"],
    ),
    (
        "gather alone",
        {"parallel__overlap_param_gather": True, "optimizer__distributed": False},
        1,
        [
            "parallel.overlap_param_gather: found true with optimizer.distributed false",
            "parallel.overlap_param_gather: found true with parallel.overlap_grad_reduce false",
        ],
    ),
    (
        "narrow reduction",
        {"precision": {"params": "fp32", "grad_reduce": "bf16"}},
        1,
        ["precision.grad_reduce: found bf16 with precision.params fp32, needs fp32"],
    ),
    (
        "history of our own",
        {"precision": {"fp8": "delayed", "fp8_backend": "native", "fp8_exclude": {"first": 1}}},
        1,
        [
            "precision.fp8: found delayed with precision.fp8_backend native, which scales each tensor by its own",
            "precision.fp8_exclude: found first 1, last 0 with precision.fp8 delayed, whose history megatron-core",
            "package transformer-engine is missing or older than 2.2, install it: pip install "
            "'transformer-engine>=2.2'",
        ],
    ),
    (
        "blocks on the CPU",
        {"precision__fp8": "blockwise", "runtime__device": "cpu"},
        1,
        [
            "precision.fp8: found blockwise with runtime.device cpu, where Transformer Engine cannot run, needs",
            "package transformer-engine is missing",
        ],
    ),
    (
        "blocks without Transformer Engine",
        {"precision__fp8": "blockwise"},
        1,
        [
            "precision.fp8 delayed or blockwise, or precision.fp8_backend transformer_engine (tensorwise runs without "
            "it): package transformer-engine is missing or older than 2.3, install it: pip install "
            "'transformer-engine>=2.3'"
        ],
    ),
    (
        "Transformer Engine on the CPU",
        {"precision": {"fp8": "tensorwise", "fp8_backend": "transformer_engine"}, "runtime__device": "cpu"},
        1,
        [
            "precision.fp8_backend: found transformer_engine with runtime.device cpu, where it cannot run, needs",
            "package transformer-engine is missing",
        ],
    ),
    (
        "no layer left for FP8",
        {"precision": {"fp8": "tensorwise", "fp8_exclude": {"first": 4, "last": 4}}},
        1,
        ["precision.fp8_exclude: found first 4, last 4, the language model has 8 layers, needs fewer"],
    ),
    (
        "grouped in file order",
        {"data__group_by_modality_length": True, "data__shuffle": False},
        1,
        ["data.group_by_modality_length: found true with data.shuffle false"],
    ),
    (
        "packed and grouped",
        {"data__group_by_modality_length": True, "data__packing": True},
        1,
        ["data.group_by_modality_length: found true with data.packing rows"],
    ),
    (
        "nothing to evaluate",
        {"training__mode": "eval", "evaluation__task": "exact_match"},
        1,
        [
            "evaluation.path: found null with training.mode eval, needs a data file, or training.mode train",
            "evaluation.task: found 'exact_match' with evaluation.path null",
        ],
    ),
    (
        "evaluation switched off",
        {"evaluation": {"path": "held_out.json", "every_steps": 5}},
        1,
        ["evaluation.every_steps: found 5 with training.mode train, which never evaluates, needs training.mode"],
    ),
    (
        "task",
        {"training__mode": "eval", "evaluation": {"path": "held_out.json", "task": "exact_mach"}},
        1,
        ["evaluation.task: found 'exact_mach', did you mean 'exact_match'?"],
    ),
    ("nothing to load", {"checkpoint__load_states": "model"}, 1, ["checkpoint.load_states: found model with"]),
    (
        "world",
        {"parallel__tensor": 2, "parallel__pipeline": 2},
        6,
        ["parallel.tensor * parallel.pipeline: found 2 * 2 = 4, the world size 6 allows 1, 2, 3, 6, or start"],
    ),
    (
        "batch",
        {"parallel__tensor": 2, "training__global_batch_size": 15, "data__packing": "off"},
        4,
        ["training.global_batch_size: found 15, needs a multiple of 4 (2 data-parallel ranks x"],
    ),
    (
        "virtual alone",
        {"parallel__virtual_pipeline": 2},
        1,
        ["parallel.virtual_pipeline: found 2 with parallel.pipeline 1, needs parallel.pipeline > 1 or 1"],
    ),
    (
        "ragged interleaving",
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "training__global_batch_size": 6, "data__packing": "off"},
        2,
        [
            "training.global_batch_size: found 6 = 3 micro-batches per rank, a virtual pipeline needs a multiple of "
            "parallel.pipeline 2, a multiple of 4 rows"
        ],
    ),
    (
        "ragged window",
        {"parallel__pipeline": 2, "training__media_window": 3},
        2,
        ["training.media_window: found 3, needs a multiple of parallel.pipeline 2, or null"],
    ),
    (
        "ragged last window",
        {
            "parallel__pipeline": 2,
            "training__media_window": 2,
            "training__global_batch_size": 10,
            "data__packing": "off",
        },
        2,
        ["training.global_batch_size: found 10 = 5 micro-batches per rank, the last media window needs"],
    ),
    (
        "heads",
        {"parallel__tensor": 16},
        16,
        [
            "parallel.tensor: found 16, which does not divide the language model's 8 attention heads and "
            "4 key-value heads, allowed: 1, 2, 4"
        ],
    ),
    (
        "layers",
        {"parallel": {"pipeline": 2, "virtual_pipeline": 3}},
        2,
        ["parallel.pipeline * parallel.virtual_pipeline: found 2 * 3 = 6, the language model's 8 layers allow 1, 2, 4"],
    ),
    ("select", {"model__vision__select_layer": -5}, 1, ["select_layer: found -5, the tower's 3 layers allow -4 to 3"]),
    (
        "short",
        {"training__sequence_length": 16},
        1,
        ["training.sequence_length: found 16, needs more than the 16 tokens of one image"],
    ),
    ("family", {"model__family": "lava"}, 1, ["model.family: found 'lava', did you mean 'llava'?"]),
    ("projector", {"model__projector__type": "mlp2x"}, 1, ["found 'mlp2x', did you mean 'mlp2x_gelu'"]),
    ("template", {"data__template": "zzz"}, 1, ["data.template: found 'zzz', allowed: auto, vicuna_v1"]),
    ("dead regex", {"model__freeze": ["lora"]}, 1, ["model.freeze[0]: found 'lora', which matches no parameter"]),
    ("bad regex", {"model__freeze": ["^vision", "("]}, 1, ["model.freeze[1]: found '(', not a regular expression"]),
    (
        "all switched off",
        {"model__train": {"language": False, "projector": False}},
        1,
        ["model.train: found language false, vision false, projector false, which leaves no parameter to train"],
    ),
    (
        "all frozen by regex",
        {"model__train": {"language": False}, "model__freeze": ["^projector"]},
        1,
        ["projector true and model.freeze ['^projector'], which leaves no parameter to train"],
    ),
]


@pytest.mark.parametrize(("changes", "world_size", "expected"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_each_violation_is_named(changes: dict[str, Any], world_size: int, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(recipe(**changes), FACTS, world_size)
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert text in message
    assert len(message.split("; ")) == len(expected)  # one violation each, and no other


VALID: list[tuple[str, dict[str, Any], int]] = [
    ("one rank", {}, 1),
    ("FP8 of our own", {"precision": {"fp8": "tensorwise", "fp8_exclude": {"first": 1, "last": 1}}}, 1),
    ("FP8 switched off", {"precision": {"fp8": None, "fp8_backend": "transformer_engine"}}, 1),
    ("everything", {"parallel": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True}}, 8),
    ("a split to be chosen", {"parallel": {"context": 4, "tensor": 2, "ulysses": 1, "ring": 1}}, 8),
    ("cudnn and whole rows in a ring", {"parallel__ring": 2, "ops__attention": "cudnn"}, 2),
    ("cudnn and packed rows", {"parallel__ulysses": 2, "data__packing": True, "ops__attention": "cudnn"}, 2),
    ("flash_attn and cut documents", {"parallel__ring": 2, "data__packing": True, "ops__attention": "flash_attn"}, 2),
    ("overlap", {"parallel": {"overlap_param_gather": True, "overlap_grad_reduce": True}}, 2),
    ("windows of a multiple", {"parallel__pipeline": 2, "training__media_window": 2}, 2),
    ("a window over all", {"parallel__pipeline": 2, "training__media_window": 9, "training__global_batch_size": 6}, 2),
    (
        "ragged but not interleaved",
        {"parallel__pipeline": 2, "training__global_batch_size": 6, "data__packing": "off"},
        2,
    ),
    ("two sources in turn", {"model__language": {"path": "here"}}, 1),
    ("first layer", {"model__vision__select_layer": -4}, 1),
    ("partly frozen", {"model__train": {"language": False}, "model__freeze": [r"projector\.0\.bias"]}, 1),
    ("evaluated", {"training__mode": "train_and_eval", "evaluation": {"path": "held_out.json", "every_steps": 5}}, 1),
    ("evaluation unused", {"evaluation": {"path": "held_out.json", "task": "exact_match"}}, 1),
    ("ragged sequence", {"parallel": {"sequence": True, "tensor": 4}, "training__sequence_length": 131}, 4),
    ("sequence that the ring cannot cut", {"parallel": {"ring": 2, "ulysses": 2}, "training__sequence_length": 67}, 4),
    ("bf16 reduction", {"precision__grad_reduce": "bf16"}, 1),
    ("second phase", {"checkpoint__load": "runs/first", "checkpoint__load_states": "model"}, 1),
]


@pytest.mark.parametrize(("changes", "world_size"), [v[1:] for v in VALID], ids=[v[0] for v in VALID])
def test_valid_recipes_pass(changes: dict[str, Any], world_size: int) -> None:
    validate(recipe(**changes), FACTS, world_size)


def test_all_violations_come_at_once() -> None:
    broken = recipe(
        parallel={"tensor": 3, "sequence": False, "overlap_param_gather": True},
        model__family="lava",
        model__freeze=["nothing"],
        training__sequence_length=8,
    )
    with pytest.raises(ConfigError) as caught:
        validate(broken, facts(installed=frozenset()), 4)
    message = str(caught.value)
    for key in (
        "model.family: ",
        "parallel.overlap_param_gather: ",
        "parallel.tensor * parallel.pipeline: ",
        "parallel.tensor: ",
        "model.freeze[0]: ",
        "training.sequence_length: ",
        "pip install psutil",
    ):
        assert key in message


def test_feed_forward_channels_are_split_too() -> None:
    with pytest.raises(ConfigError, match="190 feed-forward channels, allowed: 1, 2$"):
        validate(recipe(parallel__tensor=4), facts(ffn_hidden_size=190), 4)


@pytest.mark.parametrize(
    ("changes", "world_size", "expected"),
    [
        (
            {"precision": {"fp8": "blockwise", "fp8_exclude": {"last": 5}}, "parallel__pipeline": 2},
            2,
            "precision.fp8_exclude: found first 0, last 5, megatron-core allows each at most the 4 layers of a",
        ),
        (
            {"precision__fp8": "delayed", "parallel__tensor": 4},
            4,
            "precision.fp8: found delayed with a hidden size of 64 and 200 feed-forward channels over parallel.tensor "
            "4, Transformer Engine needs multiples of 16 on every rank",
        ),
    ],
)
def test_what_transformer_engine_would_refuse(changes: dict[str, Any], world_size: int, expected: str) -> None:
    """Where it is installed; our own FP8 takes both."""
    sizes = facts(ffn_hidden_size=200 if "parallel__tensor" in changes else 192)
    installed = replace(sizes, installed=sizes.installed | {"transformer-engine", "transformer-engine>=2.3"})
    with pytest.raises(ConfigError) as caught:
        validate(recipe(**changes), installed, world_size)
    assert expected in str(caught.value) and "; " not in str(caught.value)
    tensorwise = recipe(**{**changes, "precision": {**recipe(**changes).precision.model_dump(), "fp8": "tensorwise"}})
    with pytest.raises(ConfigError) as caught:  # auto takes Transformer Engine where it is installed
        validate(tensorwise, installed, world_size)
    message = expected.replace("found delayed with", "found tensorwise with")
    assert message in str(caught.value) and str(caught.value).endswith(", or precision.fp8_backend native")
    for changed in ({"runtime": {"device": "cpu"}}, {"precision": {"fp8_backend": "native"}}):
        tree = tensorwise.model_dump()
        for section, keys in changed.items():
            tree[section] |= keys
        validate(Config.model_validate(tree), installed, world_size)
    own = recipe(**{**changes, "precision": {"fp8": "tensorwise", "fp8_exclude": {"last": 5}}})
    validate(own, sizes, world_size)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("2.1.0", set()),
        ("2.2.0.dev0+abc", {"transformer-engine"}),
        ("2.3", {"transformer-engine", "transformer-engine>=2.3"}),
        ("2.20.2", {"transformer-engine", "transformer-engine>=2.3"}),
        (None, set()),
    ],
)
def test_an_old_transformer_engine_is_none(
    monkeypatch: pytest.MonkeyPatch, found: str | None, expected: set[str]
) -> None:
    def version(module: str) -> str:
        if module == "transformer_engine" and found is None:
            raise packages.PackageNotFoundError(module)
        return str(found)

    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda module: object())
    monkeypatch.setattr(packages, "version", version)
    assert {name for name in packages.installed_packages() if "transformer" in name} == expected


def test_backends_that_cannot_run_are_told_with_everything_else() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(recipe(parallel__tensor=3), facts(backend_obstacles=("ops.norm: told", "ops.rope: told")), 3)
    assert str(caught.value).startswith("parallel.tensor: found 3, ")
    assert str(caught.value).endswith("; ops.norm: told; ops.rope: told")


def test_missing_packages_are_those_the_recipe_needs() -> None:
    bare = facts(installed=FACTS.installed - {"matplotlib", "jinja2"})
    with pytest.raises(ConfigError) as caught:
        validate(recipe(), bare, 1)
    assert "pip install matplotlib" in str(caught.value) and "pip install jinja2" in str(caught.value)
    validate(recipe(logging__curves=False, data__template="vicuna_v1"), bare, 1)


def test_without_facts_the_other_rules_still_speak() -> None:
    nameless = recipe(model__language={}, parallel__tensor=3)
    assert not names_its_model(nameless.model)
    assert names_its_model(recipe().model)
    with pytest.raises(ConfigError, match=r"model.language: found neither.*; parallel.tensor \* parallel.pipeline"):
        validate(nameless, None, 4)


def test_trains_follows_component_and_regex() -> None:
    model = recipe(model__train={"vision": False}, model__freeze=["embed"]).model
    assert not trains("language", "language.embedding.weight", model)
    assert trains("language", "language.decoder.weight", model)
    assert not trains("vision", "vision.encoder.weight", model)
    assert trains("projector", "projector.0.weight", model)


def test_an_unknown_projector_is_reported_once() -> None:
    """Its parameter names are unknown too, and nothing is said about them."""
    unknown = recipe(
        model__projector__type="mpl2x_gelu", model__train={"language": False}, model__freeze=["^projector"]
    )
    with pytest.raises(ConfigError, match="^model.projector.type: found 'mpl2x_gelu', did you mean 'mlp2x_gelu'[^;]*$"):
        validate(unknown, facts(parameter_names={**FACTS.parameter_names, "projector": ()}), 1)


def test_a_layout_alone_is_judged_by_its_own_rules() -> None:
    other_faults = {"model__family": "lava", "training__mode": "eval"}
    validate_layout(recipe(parallel__tensor=2, **other_faults), FACTS, 4)
    with pytest.raises(ConfigError) as caught:
        validate_layout(recipe(parallel={"tensor": 3, "pipeline": 5}, **other_faults), FACTS, 4)
    world, heads, layers = str(caught.value).split("; ")
    assert "found 3 * 5 = 15" in world and "8 attention heads" in heads and "8 layers" in layers
