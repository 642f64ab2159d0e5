"""LoRA files against diffusers and PEFT: what one writes the other reads, and the networks then compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fewstep
from fewstep import Pipeline
from fewstep.adapters.inject import ATTENTION, CONVOLUTIONS, TRANSFORMERS, eject, inject, trained_lora
from fewstep.adapters.lora import Lora, networks
from fewstep.adapters.save import save_lora
from tests import oracles

peft = pytest.importorskip("peft", reason="PEFT, which diffusers needs for LoRA, is not installed")

KINDS = ("sd1", "sd2", "sdxl")
EVERYTHING = (*TRANSFORMERS, *CONVOLUTIONS, "time_emb_proj")
TOWERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
Pair = tuple[Any, Pipeline]


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """`oracle(kind)`: a tiny diffusers pipeline, and the folder into which it saved itself."""
    oracles.quiet()

    @cache
    def make(kind: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp(kind)
        pipe = oracles.pipeline(kind, folder)
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(folder / "model")
        return pipe, folder / "model"

    return make


@pytest.fixture(params=KINDS)
def pair(request: Any, oracle: Callable[[str], tuple[Any, Path]]) -> Iterator[Pair]:
    """A diffusers pipeline and ours with the same weights; its LoRAs are taken out after the test."""
    theirs, folder = oracle(request.param)
    yield theirs, fewstep.load(folder, device="cpu")
    theirs.unload_lora_weights()


@torch.no_grad()
def outputs(theirs: Any, ours: Pipeline) -> list[tuple[Tensor, Tensor]]:
    """What each network of both makes of the same inputs."""
    unet, x, t = ours.networks.unet, torch.randn(2, 4, 8, 8), torch.tensor([7, 900])
    context = torch.randn(2, 5, unet.config.context)
    added: tuple[Tensor, ...] = ()
    if unet.config.addition:
        added = (torch.randn(2, unet.config.pooled), torch.rand(2, unet.config.size_numbers) * 64)
    conditions = dict(zip(("text_embeds", "time_ids"), added, strict=bool(added)))
    pairs = [(unet(x, t, context, *added), theirs.unet(x, t, context, added_cond_kwargs=conditions).sample)]
    towers = [theirs.text_encoder, getattr(theirs, "text_encoder_2", None)]
    for mine, tower in zip(ours.networks.text_encoders, towers, strict=False):
        ids = torch.randint(0, 300, (2, oracles.WINDOW))
        ids[:, -1] = mine.config.eos
        pairs.append((mine(ids).penultimate, tower(ids, output_hidden_states=True).hidden_states[-2]))
    return pairs


def assert_same(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for mine, wanted in pairs:
        assert (mine - wanted).norm() <= 1e-5 * wanted.norm()


def random_lora(pipe: Pipeline, targets: tuple[str, ...] = ATTENTION, alpha: float = 2.0) -> Lora:
    """One of rank 4 in every network, of rank 2 in the convolutions."""
    found = networks(pipe)
    updates = [*inject(found, rank=4, alpha=alpha, targets=[t for t in targets if t not in CONVOLUTIONS])]
    if "conv1" in targets:
        updates += [*inject({"unet": found["unet"]}, rank=2, alpha=alpha, targets=CONVOLUTIONS)]
    for update in updates:
        nn.init.normal_(update.up.weight, std=0.3)
    lora = trained_lora(updates)
    eject(found)
    return lora


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_reads_what_we_write(pair, layout, tmp_path):
    theirs, ours = pair
    lora = random_lora(ours, EVERYTHING)
    save_lora(lora, tmp_path / "ours.safetensors", layout=layout)
    plain = [mine for mine, _ in outputs(theirs, ours)]
    torch.manual_seed(0)
    theirs.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    fewstep.add_lora(ours, lora)
    torch.manual_seed(0)
    pairs = outputs(theirs, ours)
    assert_same(pairs)
    assert all((mine - before).norm() > 0.01 * before.norm() for (mine, _), before in zip(pairs, plain, strict=True))


@pytest.mark.parametrize(("pair", "noted"), [*((kind, True) for kind in KINDS), ("sd1", False)], indirect=["pair"])
def test_we_read_what_diffusers_writes(pair, noted, tmp_path):
    theirs, ours = pair
    found = {"unet": theirs.unet, "text_encoder": theirs.text_encoder}
    found |= {"text_encoder_2": theirs.text_encoder_2} if hasattr(theirs, "text_encoder_2") else {}
    alpha = 6 if noted else 3
    settings: dict[str, Any] = {}
    for name, network in found.items():
        targets = [*ATTENTION[:4], "conv1", "proj_in", "ff.net.2"] if name == "unet" else TOWERS
        config = peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        network.add_adapter(config)
        settings[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(network)
        if noted:
            settings[f"{name}_lora_adapter_metadata"] = {"r": 3, "lora_alpha": alpha}
    theirs.save_lora_weights(tmp_path, **settings)
    fewstep.add_lora(ours, tmp_path)
    assert_same(outputs(theirs, ours))


@pytest.mark.parametrize("pair", ["sd1", "sdxl"], indirect=True)
def test_we_read_what_peft_writes(pair, tmp_path):
    theirs, ours = pair
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["to_q", "to_v", "conv2"], alpha_pattern={"to_v": 7}, init_lora_weights=False
    )
    wrapped = peft.get_peft_model(theirs.unet, config)
    wrapped.save_pretrained(tmp_path)
    fewstep.add_lora(ours, tmp_path)
    pairs = outputs(theirs, ours)
    theirs.unet = wrapped.unload()
    assert_same(pairs)


KOHYA = {
    "sd1": {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": ((3, 64), (64, 3)),
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj": ((2, 64), (512, 2)),
        "lora_unet_up_blocks_1_attentions_0_proj_out": ((3, 64, 1, 1), (64, 3, 1, 1)),
        "lora_unet_down_blocks_0_resnets_0_conv1": ((4, 32, 3, 3), (32, 4, 1, 1)),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": ((3, 32), (32, 3)),
        "lora_te_text_model_encoder_layers_0_self_attn_out_proj": ((3, 32), (32, 3)),
        "lora_te_text_model_encoder_layers_1_mlp_fc1": ((3, 32), (64, 3)),
    },
    "sdxl": {  # whose UNet goes by the names of the original single files
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q": ((3, 64), (64, 3)),
        "lora_unet_input_blocks_3_1_transformer_blocks_0_ff_net_0_proj": ((2, 64), (512, 2)),
        "lora_unet_output_blocks_0_1_proj_out": ((3, 64), (64, 3)),
        "lora_unet_input_blocks_1_0_in_layers_2": ((4, 32, 3, 3), (32, 4, 1, 1)),
        "lora_unet_middle_block_0_emb_layers_1": ((2, 128), (64, 2)),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": ((3, 32), (32, 3)),
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": ((3, 32), (32, 3)),
        "lora_te2_text_model_encoder_layers_1_self_attn_out_proj": ((2, 24), (24, 2)),
    },
}


def kohya_file(path: Path, kind: str) -> None:
    """As kohya's trainer writes it; one alpha, since diffusers does not apply unlike ones to attention."""
    tensors = {}
    for name, (down, up) in KOHYA[kind].items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(down)
        tensors[f"{name}.lora_up.weight"] = torch.randn(up)
        tensors[f"{name}.alpha"] = torch.tensor(1.5)
    save_file(tensors, path)


@pytest.mark.parametrize("pair", ["sd1", "sdxl"], indirect=True)
def test_kohya_files_do_the_same_in_both(pair, tmp_path):
    theirs, ours = pair
    kohya_file(tmp_path / "kohya.safetensors", ours.spec.family)
    theirs.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    fewstep.add_lora(ours, tmp_path / "kohya.safetensors")
    assert_same(outputs(theirs, ours))


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_two_loras_with_scales(pair, tmp_path):
    theirs, ours = pair
    scales = {"first": 0.7, "second": -1.3}
    for name, scale in scales.items():
        save_lora(random_lora(ours), tmp_path / f"{name}.safetensors")
        theirs.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
        fewstep.add_lora(ours, tmp_path / f"{name}.safetensors", scale)
    theirs.set_adapters(list(scales), adapter_weights=list(scales.values()))
    assert_same(outputs(theirs, ours))


@pytest.mark.parametrize("pair", ["sd1", "sdxl"], indirect=True)
def test_pictures(pair, tmp_path):
    """The whole way: the text towers' LoRA reaches the picture too."""
    theirs, ours = pair
    save_lora(random_lora(ours), tmp_path / "ours.safetensors")
    theirs.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    fewstep.add_lora(ours, tmp_path / "ours.safetensors")
    latents = torch.randn(1, 4, 8, 8)
    same = {"guidance_scale": 4.0, "width": 64, "height": 64, "latents": latents}
    wanted = theirs("a red cube", num_inference_steps=3, output_type="latent", **same).images
    got = ours.text_to_image("a red cube", steps=3, output="latent", **same).latents
    assert (got - wanted).norm() <= 1e-4 * wanted.norm()
