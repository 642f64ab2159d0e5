"""LoRA in a model: merged and taken out again, beside the weights and trained, and on the command line."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import fewstep
from fewstep.adapters.inject import ATTENTION, CONVOLUTIONS, TRANSFORMERS, eject, inject, trained_lora
from fewstep.adapters.lora import Factors, Lora, layers_of, networks
from fewstep.adapters.save import save_lora
from fewstep.cli import main
from fewstep.engines.cpu.engine import CpuEngine
from fewstep.errors import InputError, NotFiniteError
from fewstep.images import read_metadata, save_png
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig
from fewstep.train.plan import MicroBatch, Plan
from fewstep.train.trainer import Objective, Trainer
from fewstep.weights.model import LoadedModel
from fewstep.weights.save import save_model
from tests import factories

EVERYTHING = (*TRANSFORMERS, *CONVOLUTIONS)
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
PROJ = "unet.down_blocks.0.attentions.0.proj_in"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


class Model:
    """All that the functions want of a pipeline."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.spec, self.tokenizers, self.networks = model

    def weights(self) -> dict[str, torch.Tensor]:
        found = networks(self.model).items()
        return {f"{p}.{name}": value.clone() for p, network in found for name, value in network.state_dict().items()}

    @torch.no_grad()
    def outputs(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 64, generator=generator)
        ids = torch.tensor([[1, 2, 3, self.networks.text_encoders[0].config.eos]])
        return [self.networks.unet(x, torch.tensor([3, 700]), context), *self.networks.text_encoders[0](ids)]


@pytest.fixture
def model() -> Model:
    eighth = AutoencoderConfig(channels=(32, 32, 32, 32), resnets=1)
    model = factories.small_model("sd1").with_spec(autoencoder=eighth)
    model = model._replace(networks=replace(model.networks, autoencoder=AutoencoderKL(eighth)))
    for network in networks(model).values():
        network.eval().requires_grad_(False)
    return Model(model)


def random_lora(model: Model, seed: int = 0, size: float = 0.1) -> Lora:
    """Of a linear layer, a 3x3 convolution, a projection that is one in name only, and the text tower."""
    generator = torch.Generator().manual_seed(seed)
    layers, factors = layers_of(networks(model.model)), {}
    for rank, name in enumerate((TO_Q, CONV, PROJ, TEXT), 2):
        weight = layers[name].weight
        down = size * torch.randn(rank, *weight.shape[1:], generator=generator)
        up = size * torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator)
        factors[name] = Factors(down=down, up=up, alpha=3.0)
    return Lora(name=f"lora {seed}", layers=factors)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(ours, theirs, strict=True))


# merged


def test_merging_adds_the_scaled_product(model):
    before = model.weights()
    lora = fewstep.add_lora(model, random_lora(model), scale=0.5)
    after = model.weights()
    down, up = (t.double() for t in (lora.layers[TO_Q].down, lora.layers[TO_Q].up))
    wanted = before[f"{TO_Q}.weight"].double() + 0.5 * (3.0 / 2) * up @ down
    assert torch.allclose(after[f"{TO_Q}.weight"].double(), wanted, atol=1e-6)
    down, up = (t.double() for t in (lora.layers[CONV].down, lora.layers[CONV].up))
    wanted = before[f"{CONV}.weight"].double() + 0.5 * (3.0 / 3) * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    assert torch.allclose(after[f"{CONV}.weight"].double(), wanted, atol=1e-6)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in lora.layers}


def test_a_convolution_does_what_its_two_convolutions_would(model):
    lora, x = random_lora(model), torch.randn(1, 64, 6, 6)
    layer = layers_of(networks(model.model))[CONV]
    down, up = lora.layers[CONV].down, lora.layers[CONV].up
    wanted = layer(x) + nn.functional.conv2d(nn.functional.conv2d(x, down, padding=1), up)
    fewstep.add_lora(model, lora)
    assert close([layer(x)], [wanted])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_removing_restores_every_bit(model, dtype):
    for network in networks(model.model).values():
        network.to(dtype)
    before = model.weights()
    fewstep.add_lora(model, random_lora(model, 1))
    fewstep.add_lora(model, random_lora(model, 2), -0.7)
    assert not same(model.weights(), before)
    fewstep.remove_lora(model)
    assert same(model.weights(), before)


def test_half_precision_is_summed_in_float32(model):
    """Two LoRAs that cancel out leave the weights alone, though each is too small to be added in bfloat16 exactly."""
    for network in networks(model.model).values():
        network.to(torch.bfloat16)
    before, lora = model.weights(), random_lora(model, size=0.02)
    fewstep.add_lora(model, lora, 1.0)
    fewstep.add_lora(model, lora, -1.0)
    assert same(model.weights(), before)


@pytest.mark.parametrize("first_out", [0, 1])
def test_one_of_two_can_be_removed(model, first_out):
    loras, before = [random_lora(model, 1), random_lora(model, 2)], model.weights()
    fewstep.add_lora(model, loras[1 - first_out], 0.3)
    alone = model.weights()
    fewstep.remove_lora(model)
    for lora in loras:
        fewstep.add_lora(model, lora, 0.3)
    fewstep.remove_lora(model, loras[first_out])
    assert same(model.weights(), alone)
    fewstep.remove_lora(model, loras[1 - first_out])
    assert same(model.weights(), before)


def test_removing_what_is_not_there_is_an_error(model):
    fewstep.remove_lora(model)
    fewstep.add_lora(model, random_lora(model, 3))
    with pytest.raises(InputError, match="lora 4 is not merged into a tiny sd1; merged: lora 3"):
        fewstep.remove_lora(model, random_lora(model, 4))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_is_a_number(model, scale):
    with pytest.raises(InputError, match="scale"):
        fewstep.add_lora(model, random_lora(model), scale)


@pytest.mark.parametrize("name", ["unet.conv_in", "unet.gone"])
def test_a_lora_of_another_model(model, name):
    factors = Factors(down=torch.ones(2, 5), up=torch.ones(5, 2), alpha=1.0)
    before, lora = model.weights(), random_lora(model)
    with pytest.raises(InputError, match=f"{name}, which a tiny sd1 has not"):
        fewstep.add_lora(model, replace(lora, layers={**lora.layers, name: factors}))
    assert same(model.weights(), before)


def test_an_overflow_leaves_the_model_as_it_was(model):
    for network in networks(model.model).values():
        network.half()
    kept = fewstep.add_lora(model, random_lora(model))
    before = model.weights()
    with pytest.raises(NotFiniteError, match=r"lora 1 at 1e\+07.*float16.*lower the scale"):
        fewstep.add_lora(model, random_lora(model, 1), 1e7)
    assert same(model.weights(), before)
    fewstep.remove_lora(model, kept)


# beside the weights


@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
def test_a_fresh_lora_changes_nothing(model, targets):
    before = model.outputs()
    inject(networks(model.model), rank=3, targets=targets)
    assert all(torch.equal(a, b) for a, b in zip(model.outputs(), before, strict=True))


def test_only_the_lora_is_trained(model):
    found = networks(model.model)
    updates = inject(found, rank=3, targets=EVERYTHING)
    wanted = {id(parameter) for parameter in updates.parameters()}
    assert {id(p) for network in found.values() for p in network.parameters() if p.requires_grad} == wanted
    assert len(wanted) == 2 * len(updates)


def test_a_second_injection_keeps_the_first_trainable(model):
    first = inject(networks(model.model), rank=3)
    inject(networks(model.model), rank=5, targets=CONVOLUTIONS)
    assert all(parameter.requires_grad for parameter in first.parameters())


def test_beside_and_merged_are_one_function(model):
    before, found = model.outputs(), networks(model.model)
    updates = inject(found, rank=3, alpha=1.5, targets=EVERYTHING)
    for update in updates:
        nn.init.normal_(update.up.weight, std=0.1)
    beside = model.outputs()
    assert not close(beside, before)
    eject(found)
    assert close(model.outputs(), before)
    fewstep.add_lora(model, trained_lora(updates))
    assert close(model.outputs(), beside)


def test_pictures_of_a_lora_in_training_are_those_of_the_plain_engine():
    """In every kind of layer: the engine for CPUs knows nothing of what stands beside them."""
    pipe = fewstep.load("blocks-base", device="cpu")
    updates = inject({"unet": pipe.networks.unet}, rank=2, targets=(*TRANSFORMERS, *CONVOLUTIONS))
    with torch.no_grad():
        for update in updates:
            update.up.weight.normal_(0, 0.01)
    options = {"steps": 2, "seed": 1, "width": 64, "height": 64, "output": "latent"}
    found = fewstep.Pipeline.of(pipe).text_to_image("a red cube", **options).latents
    wanted = fewstep.Pipeline.of(pipe, plain=True).text_to_image("a red cube", **options).latents
    assert torch.equal(found, wanted)
    eject({"unet": pipe.networks.unet})
    assert isinstance(fewstep.Pipeline.of(pipe).engine, CpuEngine)


def test_gradients_reach_every_layer(model):
    """Also the projections whose weights the transformer reads by itself."""
    updates = inject({"unet": model.networks.unet}, rank=2, targets=EVERYTHING)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 64)
    model.networks.unet(x, torch.tensor([3]), context).square().sum().backward()
    assert [update.name for update in updates if not update.up.weight.grad.abs().sum() > 0] == []


def test_dropout_is_for_training_alone(model):
    updates = inject(networks(model.model), rank=8, targets=("to_q", "to_k"), dropout=0.5)
    for update in updates:
        nn.init.normal_(update.up.weight)
    assert not torch.equal(model.outputs()[0], model.outputs()[0])
    updates.eval()
    assert torch.equal(model.outputs()[0], model.outputs()[0])


def test_half_precision_models_get_a_float32_lora(model):
    unet = model.networks.unet.bfloat16()
    updates = inject({"unet": unet}, rank=2)
    assert {parameter.dtype for parameter in updates.parameters()} == {torch.float32}
    out = unet(torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor([3]), torch.randn(1, 3, 64).bfloat16())
    assert out.dtype == torch.bfloat16


def test_training_a_lora(model, tmp_path):
    """The loss falls, the base stays, and what is saved holds the LoRA alone and does the same."""
    before, unet = model.weights(), model.networks.unet
    x, context, goal = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 64), torch.randn(2, 4, 8, 8)
    updates = inject({"unet": unet}, rank=4)
    losses: list[float] = []

    def loss(micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
        value = (unet(x, torch.tensor([3, 700]), context) - goal).square().mean()
        losses.append(value.item())
        return {"loss": value}

    objectives = {"lora": Objective(network=updates, loss=loss)}
    trainer = Trainer(
        objectives, Plan(folder=tmp_path / "run", learning_rate=2e-2, steps=6, warmup_steps=1, ema_decay=0.0)
    )
    trainer.run()
    assert losses[-1] < 0.97 * losses[0]
    state = torch.load(next((tmp_path / "run").glob("*.pt")), weights_only=True)
    assert state["lora"]["model"].keys() == updates.state_dict().keys()
    trained = model.outputs()
    eject({"unet": unet})
    assert same(model.weights(), before)
    updates.load_state_dict(trainer.averaged("lora"))
    save_lora(trained_lora(updates), tmp_path / "trained.safetensors")
    fewstep.add_lora(model, tmp_path / "trained.safetensors")
    assert close(model.outputs(), trained)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"rank": 0}, "rank 0"), ({"dropout": 1.0}, "dropout 1"), ({"targets": ("to_w",)}, "no layer ends with to_w")],
    ids=str,
)
def test_what_cannot_be_injected(model, changes, says):
    before = list(model.networks.unet.modules())
    with pytest.raises(InputError, match=says):
        inject(networks(model.model), **({"rank": 4} | changes))
    assert list(model.networks.unet.modules()) == before


# the command line


@pytest.fixture
def draw(model: Model, tmp_path: Path, monkeypatch: Any, capsys: Any) -> Any:
    """`draw("-o", "a.png")`: exit code, what was printed on stderr; in a folder with a model and two LoRAs."""
    monkeypatch.chdir(tmp_path)
    save_model(model.model, "model")
    for seed in (1, 2):
        save_lora(random_lora(model, seed), f"{seed}.safetensors")

    asked = ["a cube", "--model", "model", "--size", 64, "--steps", 2, "--seed", 3]

    def run(*more: object) -> tuple[int, str]:
        code = main(["generate", *map(str, [*([] if "--like" in more else asked), *more])])
        return code, capsys.readouterr().err

    return run


def picture(name: str) -> bytes:
    return Image.open(name).tobytes()


def test_the_command_merges_loras_with_scales(draw):
    assert draw("-o", "plain.png")[0] == 0
    assert draw("--lora", "1.safetensors", "-o", "one.png")[0] == 0
    assert draw("--lora", "1.safetensors:0", "-o", "none.png")[0] == 0
    assert draw("--lora", "1.safetensors:0.5", "--lora", "2.safetensors:-1", "-o", "both.png")[0] == 0
    assert picture("none.png") == picture("plain.png")
    drawn = sorted(picture(f"{name}.png") for name in ("plain", "one", "both"))
    assert all(a != b for a, b in pairwise(drawn))


def test_like_merges_the_same_loras_again(draw, monkeypatch):
    draw("--lora", "1.safetensors:0.5", "--lora", "2.safetensors:-1", "-o", "both.png")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert draw("--like", "../both.png", "-o", "again.png")[0] == 0
    assert picture("again.png") == picture("../both.png")


def test_a_picture_tells_its_loras(draw):
    draw("--lora", "1.safetensors:0.5", "-o", "one.png")
    (entry,) = read_metadata("one.png")["lora"]
    assert (entry["file"], entry["scale"], len(entry["sha256"])) == ("1.safetensors", 0.5, 64)


def test_like_refuses_a_lora_that_has_changed(draw):
    draw("--lora", "1.safetensors", "-o", "one.png")
    Path("2.safetensors").replace("1.safetensors")
    code, says = draw("--like", "one.png", "-o", "again.png")
    assert code == 2
    assert "'1.safetensors', which has changed; give it with --lora" in says
    assert draw("--like", "one.png", "--lora", "1.safetensors", "-o", "again.png")[0] == 0


@pytest.mark.parametrize(
    "lora", [5, ["a"], [{"file": "1.safetensors"}], [{"file": 1, "scale": 1, "sha256": ""}]], ids=str
)
def test_like_distrusts_what_a_picture_says_of_loras(draw, lora):
    save_png(
        Image.new("RGB", (8, 8)), "odd.png", {"fewstep": "9.9", "prompt": "a cube", "model": "model", "lora": lora}
    )
    code, says = draw("--like", "odd.png")
    assert code == 2
    assert "by fewstep '9.9', says lora" in says


@pytest.mark.parametrize(
    ("value", "code", "says"),
    [
        ("gone.safetensors", 2, "there is no file 'gone.safetensors'"),
        ("1.safetensors:half", 2, "there is no file '1.safetensors:half'"),
        ("1.safetensors:nan", 2, "scale"),
        ("model/unet/diffusion_pytorch_model.safetensors", 3, "no LoRA"),
    ],
)
def test_what_the_command_refuses(draw, value, code, says):
    assert draw("--lora", value, "-o", "a.png")[0] == code
    assert says in draw("--lora", value, "-o", "a.png")[1]
    assert not Path("a.png").exists()
