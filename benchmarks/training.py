"""Pictures a second of a training step, beside that of diffusers' text-to-image script, on blocks-base's UNet.

    python -m benchmarks.training --hardware NAME [--runs 15] [--batch 32] [--threads 2] [--device cuda]

Both train the same 6.27 M parameters for pictures of 128 pixels, by turns in one process, with AdamW, clipped gradients
and a moving average. Diffusers' step is that of its `train_text_to_image.py`, which encodes pictures and captions in
each step, and once more from latents and text states that are there; each in float32 and bfloat16. Fewstep's is a
`Trainer`'s with all that belongs to it, data included: files that `fewstep data` prepared and cached. How long it
waited for them is told too. On a card ours is timed as it is recorded (`plan.cuda_graphs`) and as it is not, and a step
ends when the card has ended it; where diffusers is not installed, ours stand alone. Writes
`results/training_<hardware>_<date>.md`.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import fewstep
from benchmarks.commit import add_commit_option, commit_line
from fewstep.data.cache import latent_key, open_cache
from fewstep.data.shards import open_shards
from fewstep.engines.device import choose_device
from fewstep.train.datasets import CachedLatents, ShardDataset
from fewstep.train.diffusion import DiffusionTask
from fewstep.train.forward_process import computing_in
from fewstep.train.plan import MicroBatch, Plan, Precision
from fewstep.train.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "transformers")
PICTURES = 600
CLIP, RATE = 1.0, 1e-4
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")

Step = Callable[[int], None]


def prepared(folder: Path) -> CachedLatents:
    """Scenes as files, prepared and cached by the commands that users give."""
    web, shards, latents = (folder / name for name in ("web", "shards", "latents"))
    for arguments in (
        ["blockworld", "--count", str(PICTURES), "--out", str(web)],
        ["prepare", str(web), "--out", str(shards), "--min-size", "64", "--side", "128"],
        ["cache", str(shards), "--out", str(latents), "--store", "float32"],
    ):
        subprocess.run([sys.executable, "-m", "fewstep", "data", *arguments], check=True, stdout=subprocess.DEVNULL)
    data, pipe = ShardDataset(folder=shards), fewstep.load("blocks-base", device="cpu")
    key = latent_key(
        open_shards(shards), pipe.networks.autoencoder.state_dict(), pipe.spec.autoencoder.scaling_factor, torch.float32
    )
    return CachedLatents(data=data, cache=open_cache(latents, data.shards(), key))


def our_steps(
    source: CachedLatents, folder: Path, batch: int, device: torch.device
) -> dict[str, tuple[Step, Callable[[], float]]]:
    """A step of ours by its name, and how many seconds it has waited for data."""
    found = {}
    for precision in PRECISIONS:
        for replayed in (False, True) if device.type == "cuda" else (True,):
            what = f"{precision}{', recorded' * (replayed and device.type == 'cuda')}"
            plan = Plan(
                folder=folder / what,
                steps=10**6,
                batch_size=batch,
                learning_rate=RATE,
                max_grad_norm=CLIP,
                precision=precision,
            )
            plan = replace(plan, cuda_graphs=replayed)
            setup = DiffusionTask(model="blocks-base", data=source, device=str(device)).prepare(plan)
            found[f"fewstep, cached latents, {what}"] = (
                _advancing(Trainer(setup.objectives, plan)),
                setup.waited_seconds,
            )
    return found


def _advancing(trainer: Trainer) -> Step:
    return lambda step: trainer.advance()


class TheirStep:
    """The body of the training loop of diffusers' `train_text_to_image.py`, on the saved blocks-base."""

    def __init__(
        self,
        folder: Path,
        source: CachedLatents,
        batch: int,
        precision: Precision,
        device: torch.device,
        *,
        cached: bool,
    ) -> None:
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from diffusers.training_utils import EMAModel
        from transformers import CLIPTextModel, PreTrainedTokenizerFast

        self.source, self.precision, self.cached, self.batch, self.device = source, precision, cached, batch, device
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32).train()
        self.unet.to(device)
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32).eval().to(device)
        self.text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", torch_dtype=torch.float32).eval()
        self.text.to(device)
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        self.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=RATE)
        self.ema = EMAModel(self.unet.parameters())

    def __call__(self, step: int) -> None:
        """One step: the example's, from pictures or from what is cached."""
        micro_batch = MicroBatch(seed=0, step=step, whole=self.batch, first=0, count=self.batch)
        with computing_in(self.precision, self.device):
            latents, states = self._encoded(micro_batch)
            noise = torch.randn_like(latents)
            t = torch.randint(0, 1000, (len(latents),), device=self.device)
            noisy = self.scheduler.add_noise(latents, noise, t)
            wanted = self.scheduler.get_velocity(latents, noise, t)
            output = self.unet(noisy, t, states, return_dict=False)[0]
            loss = F.mse_loss(output.float(), wanted.float(), reduction="mean")
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())

    @torch.no_grad()
    def _encoded(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        batch = (self.source if self.cached else self.source.data).batch(micro_batch)
        said = self.tokenizer(batch.captions, padding="max_length", max_length=24, return_tensors="pt").input_ids
        latents = batch.latents
        if latents is None:
            pictures = batch.pictures.to(self.device)
            latents = self.vae.encode(pictures).latent_dist.sample() * self.vae.config.scaling_factor
        return latents.to(self.device), self.text(said.to(self.device)).last_hidden_state


def timed(steps: Mapping[str, Step], runs: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step, by turns, after two of each that do not count; to the end of what a card computes."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step(run)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if run >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(seconds: Mapping[str, list[float]], waited_seconds: Mapping[str, float], options: argparse.Namespace) -> str:
    """The results file."""
    rates = {name: options.batch / median(values) for name, values in seconds.items()}
    theirs = [rate for name, rate in rates.items() if name.startswith("diffusers")]
    best = max(theirs or rates.values())
    lines = [
        "# Training throughput on blocks-base's UNet (6,272,708 parameters, 128 pixels)",
        "",
        f"{options.hardware}, {options.threads} threads, batch {options.batch}, {datetime.date.today()}; "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES if find_spec(name))
        + f", fewstep {fewstep.__version__}"
        + f". Medians of {options.runs} steps, by turns in one process.",
        "",
        f"| step | pictures/s | slowest to fastest | of {'diffusers' if theirs else 'the'} best | waited for data |",
        "|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        low, high = options.batch / max(values), options.batch / min(values)
        wait = f"{waited_seconds[name]:.1%}" if name in waited_seconds else ""
        lines.append(f"| {name} | {rates[name]:.1f} | {low:.1f} to {high:.1f} | {rates[name] / best:.2f} | {wait} |")
    command = (
        f"python -m benchmarks.training --hardware {options.hardware} --runs {options.runs} --batch {options.batch}"
    )
    command += f" --threads {options.threads}{f' --device {options.device}' if options.device != 'cpu' else ''}"
    return "\n".join([*lines, "", f"{commit_line(options.commit)} Command: `{command}`.", ""])


def their_steps(source: CachedLatents, folder: Path, batch: int, device: torch.device) -> dict[str, Step]:
    """Diffusers' steps by name; none where it is not installed."""
    if find_spec("diffusers") is None:
        return {}
    kinds = {"pictures encoded in each step": False, "cached latents": True}
    return {
        f"diffusers, {what}, {precision}": TheirStep(folder, source, batch, precision, device, cached=cached)
        for precision in PRECISIONS
        for what, cached in kinds.items()
    }


def main() -> None:
    """Measure and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    add_commit_option(parser)
    options = parser.parse_args()
    device = choose_device(options.device)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = prepared(folder)
        fewstep.load("blocks-base", device="cpu", dtype="float32").save(folder / "model")
        ours = our_steps(source, folder, options.batch, device)
        steps = their_steps(source, folder / "model", options.batch, device)
        seconds = timed(steps | {name: step for name, (step, _) in ours.items()}, options.runs, device)
        waited_seconds = {name: wait() / sum(seconds[name]) for name, (_, wait) in ours.items()}
        path = RESULTS / f"training_{options.hardware}_{datetime.date.today()}.md"
        path.write_text(report(seconds, waited_seconds, options), encoding="utf-8")
    print(path.read_text(encoding="utf-8"), path, sep="\n")


if __name__ == "__main__":
    main()
