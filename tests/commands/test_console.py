"""The console command as a process: what it imports before it refuses a wrong word, and a pipe that is closed."""

import json
import os
import subprocess
import sys

import pytest

from hf_thinkingvit.commands.command import user_errors
from hf_thinkingvit.flags import LineParser


SCRIPT = """
import json, sys
from hf_thinkingvit.commands.__main__ import main

for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:
        print(end.code)
print(sorted({"torch", "transformers", "datasets", "accelerate"} & set(sys.modules)))
"""


@pytest.fixture
def script(tmp_path):
    """As pip installs it."""
    path = tmp_path / "hf-thinkingvit"
    path.write_text(SCRIPT)
    return path


def test_what_is_wrong_is_refused_before_anything_large_is_imported(script, tmp_path):
    absent, model = str(tmp_path / "absent"), tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (model / name).write_text("{}")
    goal, repository = ["--max-drop", "0.1"], ["--repo-id", "org/name"]
    commands = {"sweep": [], "calibrate": goal, "classify": [], "segment": [], "export": [], "push": repository}
    lines = [[], ["absent"], ["convert", absent, str(tmp_path / "out")], ["finetune", absent, "--source", str(model)]]
    lines += [["finetune", "photos", "--source", absent], ["convert", "--help"]]
    for name, words in commands.items():
        images = [] if name == "push" else ["--dataset", "org/name"]
        lines += [[name, "--help"], [name, "--model", str(model), *words, *images, "--thresold", "1"]]
        lines.append([name, "--model", absent, *words, *images])
        lines.append(
            [name, "--model", str(model), *words, *(["--dataset", absent] if images else ["--results", absent])]
        )
    done = subprocess.run([sys.executable, script, json.dumps(lines)], capture_output=True, text=True, timeout=300)
    *_, imported = done.stdout.splitlines()
    assert imported == "[]", done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == 4 + 3 * len(commands) and all(": error: " in line for line in errors)
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["2"] * 4 + ["0"] + ["0", "2", "2", "2"] * 6


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise there")
def test_a_closed_pipe_ends_it_quietly(tmp_path):
    script = tmp_path / "hf-thinkingvit"
    script.write_text("from hf_thinkingvit.commands.__main__ import main\nmain()\n")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, script], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_pipe_other_than_the_output_is_an_error(capsys):
    with pytest.raises(SystemExit, match="^2$"), user_errors(LineParser(prog="command"), debug=False):
        raise BrokenPipeError("the other side has gone")
    assert capsys.readouterr().err == "command: error: the other side has gone\n"
