"""`fewstep train`, as a user would: from a recipe to a model that loads, stopped and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fewstep
from fewstep.cards.training_record import read_training
from fewstep.cli import main

RECIPE = """
from pathlib import Path
from fewstep.train.diffusion import DiffusionTask
from fewstep.train.plan import Plan
from fewstep.train.stages import RecipeStage
from fewstep.train.datasets import Blockworld

def stages(out):
    data = Blockworld(size=32)
    shared = dict(batch_size=4, learning_rate=1e-3, warmup_steps=1, log_steps=1)
    first = DiffusionTask(model="blocks-base", data=data, sample_prompts=("a red cube",))
    lora = DiffusionTask(model=out / "first" / "model", data=data, lora_rank=2)
    return [
        RecipeStage(task=first, plan=Plan(folder=out / "first", steps=3, sample_steps=3, **shared)),
        RecipeStage(task=lora, plan=Plan(folder=out / "lora", steps=2, **shared)),
    ]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny_recipe.py"
    path.write_text(RECIPE)
    return path


def unet_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_recipe_is_trained_to_a_model_that_draws(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    assert main(["train", str(recipe), "--out", str(out), "first.plan.learning_rate=2e-3"]) == 0
    said = capsys.readouterr().out
    assert "plan.learning_rate = 0.002" in said
    assert "kg CO2" in said
    log = [json.loads(line) for line in (out / "first" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]
    assert (out / "first" / "sample-00000003.png").is_file()
    assert [stage.name for stage in read_training(out / "first" / "model").stages] == ["first"]
    pipe = fewstep.load(out / "first" / "model")
    before = pipe.text_to_image("a red cube", steps=1, seed=1, output="latent").latents
    fewstep.add_lora(pipe, out / "lora" / "lora.safetensors")
    after = pipe.text_to_image("a red cube", steps=1, seed=1, output="latent").latents
    assert not torch.equal(before, after)
    assert main(["train", str(recipe), "--out", str(out), "first.plan.learning_rate=2e-3"]) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert main(["train", str(recipe), "--out", str(out), "--stage", "first"]) == 2
    assert "with other settings: plan.learning_rate was '0.002' and is '0.001'" in capsys.readouterr().err
    assert (
        main(["train", str(recipe), "--out", str(out), "--stage", "first", "plan.learning_rate=2e-3", "plan.steps=5"])
        == 0
    )
    assert "goes on at step 3" in capsys.readouterr().out
    assert [stage.steps for stage in read_training(out / "first" / "model").stages] == [5]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan.stepss=3"], "did you mean 'steps'"),
        (["--stage", "frist"], "did you mean 'first'"),
        (["plan.batch_size=5", "plan.gradient_accumulation=2"], "cannot be shared out"),
        (["plan.steps=-3"], "plan.steps is -3; it must be a whole number from 1"),
        (["plan.learning_rate=nan"], "plan.learning_rate is nan"),
        (["plan.ema_decay=1.5"], "plan.ema_decay is 1.5"),
        (["task.model=nowhere", "--stage", "first"], "unknown model 'nowhere'"),
        (["task.lora_rank=-1", "--stage", "first"], "rank -1"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_mistake_is_told_before_anything_is_written(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    said: str,
    more: tuple[str, ...],
) -> None:
    assert main(["train", str(recipe), "--out", str(tmp_path / "run"), *arguments, *more]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", str(recipe), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "ready to train" in said
    assert "begins with what first leaves" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["first", "lora"])
def test_training_that_runs_away_is_an_error_and_leaves_no_model(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture, stage: str
) -> None:
    text = recipe.read_text().replace('model=out / "first" / "model"', 'model="blocks-base"')
    recipe.write_text(text)
    arguments = [
        "plan.learning_rate=1e30",
        "plan.max_grad_norm=1e30",
        "plan.steps=30",
        "plan.sample_steps=0",
        "--stage",
        stage,
    ]
    assert main(["train", str(recipe), "--out", str(tmp_path / "run"), *arguments]) == 4
    said = capsys.readouterr().err
    assert "lower plan.learning_rate" in said
    assert not (tmp_path / "run" / stage / "model").exists()
    assert not (tmp_path / "run" / stage / "lora.safetensors").exists()


def test_pictures_are_drawn_while_a_lora_is_trained(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace('model=out / "first" / "model"', 'model="blocks-base"'))
    arguments = ["task.sample_prompts=a red cube", "plan.sample_steps=2", "--stage", "lora"]
    assert main(["train", str(recipe), "--out", str(tmp_path / "run"), *arguments]) == 0
    assert (tmp_path / "run" / "lora" / "sample-00000002.png").is_file()


BROKEN = {
    "def stages(out):\n    return 1 / 0\n": "ZeroDivisionError",
    "def stages(out:\n": "SyntaxError",
    "import nowhere_at_all\n": "ModuleNotFoundError",
    "def stages(out):\n    return [5]\n": "each must be a RecipeStage",
    "def stages(out):\n    return None\n": "it must return a list of at least one RecipeStage",
    "def stages():\n    return []\n": "cannot be called with the output folder alone",
}


@pytest.mark.parametrize("text", BROKEN)
def test_an_error_of_the_recipe_is_shown_as_its_own(tmp_path: Path, capsys: pytest.CaptureFixture, text: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    assert main(["train", str(tmp_path / "mine.py"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert BROKEN[text] in said
    assert "mine.py" in said
    assert "a bug in fewstep" not in said


def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", str(tmp_path / "nothing.py")]) != 0
    (tmp_path / "empty.py").write_text("")
    assert main(["train", str(tmp_path / "empty.py")]) != 0
    said = capsys.readouterr().err
    assert "there is no recipe" in said
    assert "no function stages" in said


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_gone_on_with_it_is_the_same_run(recipe: Path, tmp_path: Path, how: signal.Signals) -> None:
    settings = ["plan.steps=40", "plan.sample_steps=0", "--stage", "first"]
    for name in ("whole", "parts"):
        command = [sys.executable, "-m", "fewstep", "train", str(recipe), "--out", str(tmp_path / name), *settings]
        run = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        if name == "parts":
            log = tmp_path / name / "first" / "log.jsonl"
            while not log.is_file() or len(log.read_text().splitlines()) < 3:
                assert run.poll() is None
                time.sleep(0.05)
            run.send_signal(how)
            assert run.wait() == 130
            assert [path.suffix for path in log.parent.glob("step-*")] == [".pt"]
            assert not (tmp_path / name / "first" / "model").exists()
            run = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        assert run.wait() == 0
    whole, parts = (unet_of(tmp_path / name / "first") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_two_processes_train_as_one(recipe: Path, tmp_path: Path) -> None:
    launch = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    for name, launcher in launch.items():
        command = [sys.executable, *launcher, "-m", "fewstep", "train", str(recipe), "--stage", "first"]
        command += ["--out", str(tmp_path / name)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    one, two = (unet_of(tmp_path / name / "first") for name in launch)
    start = load_file(Path(fewstep.__file__).parent / "assets/blocks-base/unet/diffusion_pytorch_model.safetensors")
    to_device, apart = (
        torch.cat([(one[name] - other[name].float()).flatten() for name in one]).norm() for other in (start, two)
    )
    assert apart < 0.02 * to_device  # AdamW makes whole steps of the rounding of gradients that are nearly 0
