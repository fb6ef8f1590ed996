"""load(path, devices=[...]): ranks behind the call answer as one process does, and leave nothing behind.

The scripts have no `if __name__ == "__main__"`, as a user's first script has none.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.data.videos import make_video
from tests.helpers.models.tiny import tiny_dataset, tiny_tokenizer
from tests.helpers.ranks.processes import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LIMIT_SECONDS = 600
ASK = """
import json, os, signal, sys
from megatron_vlm import load
from megatron_vlm.generation import ranks
from megatron_vlm.errors import MegatronVlmError
from megatron_vlm.generation.chat import Chat

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job begins without
path, image = sys.argv[1:]
prompts = [["far?"], [image, "What is this red?"], [image, image, "which?"]]
drawn = {"temperature": 1.5, "top_p": 0.9, "seed": 3}

def ask(assistant):
    chat = Chat(assistant, max_new_tokens=4)
    return [
        assistant.generate(prompts, max_new_tokens=8),
        assistant.generate(prompts, 8, batch_size=2, **drawn),
        [chat.say([image, "far?"]), chat.say("near?")],
    ]

def scores(assistant):
    return [score.log_probability for score in assistant.score(prompts, ["near", "", "red blue"])]

def error_of(call):
    try:
        call()
    except MegatronVlmError as error:
        return f"{type(error).__name__}: {error}"

told = {}
with load(path, devices=["cpu", "cpu"]) as assistant:
    told["tp2"] = ask(assistant)
    open("bad.png", "w").write("none")
    told["bad image"] = error_of(lambda: assistant.generate(["bad.png", "?"]))
    told["bad markers"] = error_of(lambda: assistant.generate("<image>?"))
    told["tp2 scores"] = scores(assistant)
    told["video"] = assistant.generate(["clip.mp4", "far?"], max_new_tokens=8)
    told["bad video"] = error_of(lambda: assistant.generate(["short.mkv", "?"]))
    told["bad answers"] = error_of(lambda: assistant.score(prompts, ["near"]))
    try:
        assistant.generate("?", stop=(part for part in "."))
    except TypeError as error:
        told["not to be sent"] = str(error)
    told["alive after"] = assistant.generate(prompts, max_new_tokens=8) == told["tp2"][0]
    pids = [process.pid for process in assistant._children.processes]
told["closed"] = error_of(lambda: assistant.generate("?"))
told["left"] = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
killed = load(path, devices=["cpu", "cpu"], pipeline=2)
told["pp2"] = ask(killed)
pids = [process.pid for process in killed._children.processes]
os.kill(pids[1], signal.SIGKILL)
told["killed"] = error_of(lambda: killed.generate("?"))
told["left after kill"] = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
for axis in ("ring", "ulysses"):
    with load(path, devices=["cpu", "cpu"], **{axis: 2}) as assistant:
        told[axis], told[f"{axis} scores"] = ask(assistant), scores(assistant)
        told[f"{axis} alone"] = assistant.score("far?", "near").log_probability
with load(path, devices=["cpu", "cpu"]) as assistant:
    gather = ranks._gather
    ranks._gather = lambda connections: os.kill(os.getpid(), signal.SIGINT) or gather(connections)
    try:
        assistant.generate(prompts, max_new_tokens=8)
    except KeyboardInterrupt:
        told["after interrupt"] = error_of(lambda: assistant.generate("?"))
    ranks._gather = gather
told["missing"] = error_of(lambda: load("nowhere", devices=["cpu", "cpu"]))
told["no rank"] = error_of(lambda: load(path, ring=0))
alone = load(path, devices=["cpu"])
told["alone"], told["scores"] = ask(alone), scores(alone)
told["video alone"] = alone.generate(["clip.mp4", "far?"], max_new_tokens=8)
print(json.dumps(told))
"""
WAIT = """
import sys, time
from megatron_vlm import load
assistant = load(sys.argv[1], devices=["cpu", "cpu"])
print(*[process.pid for process in assistant._children.processes], flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.models.verify_models import Shape, draw, save_llava_hf

    return save_llava_hf(draw(Shape(text={"num_hidden_layers": 4})), tmp_path_factory.mktemp("model") / "hf")


def test_ranks_answer_as_one_process_and_fail_with_one_error(model: Path, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path), tiny_dataset(tmp_path)
    (tmp_path / "ask.py").write_text(ASK)
    make_video(tmp_path / "clip.mp4", 24, g="8")
    whole = make_video(tmp_path / "short.mkv", 48, g="8", crf="10").read_bytes()
    (tmp_path / "short.mkv").write_bytes(whole[: len(whole) // 2])  # its last frames are the other rank's to read
    command = [sys.executable, "ask.py", str(model), str(tmp_path / "images" / "1-0.png")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["tp2"] == told["alone"] and told["pp2"] == told["alone"]
    assert told["ring"] == told["alone"] and told["ulysses"] == told["alone"]
    for layout in ("tp2", "ring", "ulysses"):
        assert told[f"{layout} scores"] == pytest.approx(told["scores"], rel=1e-5)
        if layout != "tp2":
            assert told[f"{layout} alone"] == pytest.approx(told["scores"][0], rel=1e-5)
    assert told["bad answers"] == "DataError: answers: found ['near'], needs 3 texts"
    assert told["no rank"] == "ConfigError: ring: found 0, needs an integer of at least 1"
    assert len(set(told["alone"][0])) == 3 and told["alone"][0] != told["alone"][1]
    assert told["bad image"].startswith("BadSample: prompt 1: image") and "cannot be read" in told["bad image"]
    assert "1 image marker" in told["bad markers"] and told["alive after"]
    assert told["video"] == told["video alone"] and "short.mkv cannot be read" in told["bad video"], told["bad video"]
    assert "pickle" in told["not to be sent"]
    assert told["after interrupt"].startswith("ParallelError: the ranks of ")
    assert told["closed"].startswith("ParallelError: the ranks of ") and told["left"] == []
    assert told["killed"].startswith("ParallelError: rank 1 of ") and "exit code -9" in told["killed"]
    assert told["left after kill"] == []
    assert told["missing"].startswith("CheckpointError: no checkpoint at nowhere")


def test_ranks_end_with_a_killed_parent(model: Path, tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text(WAIT)
    parent = subprocess.Popen(
        [sys.executable, "wait.py", str(model)], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in pids)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
