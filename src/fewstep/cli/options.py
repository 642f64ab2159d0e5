"""The options of `fewstep generate`: their types, letters and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

SAMPLERS = "euler, euler_ancestral, heun, ddim, plms, dpmpp_2m, dpmpp_2m_sde, dpmpp_sde, dpmpp_3m_sde, unipc, lcm, ddpm"
SCHEDULES = "leading, trailing, linspace, karras, exponential, sgm_uniform, simple, align_your_steps"

_START, _FINISH, _MODEL, _MACHINE = "Start from an image", "Refine", "Unusual models", "Machine"

Prompt = Annotated[str | None, Argument(help="What the image shows.", show_default=False)]
Output = Annotated[
    str | None,
    Option("--output", "-o", help="PNG, JPEG or WebP file (else fewstep-SEED.png), a folder/, or - for stdout."),
]
Force = Annotated[bool, Option("--force", "-f", help="Overwrite files that are there.")]
Model = Annotated[
    str | None,
    Option("--model", "-m", help="Name, folder, file or hub id (else blocks-turbo); fewstep models lists names."),
]
Lora = Annotated[
    list[str] | None,
    Option(metavar="FILE[:SCALE]", help="A LoRA to merge, in part (0.5) or turned around (-1); may be repeated."),
]
NegativePrompt = Annotated[str | None, Option(help="What to keep out of the image.")]
Steps = Annotated[int | None, Option(help="Denoising steps.")]
Guidance = Annotated[
    float | None,
    Option("--guidance-scale", "-g", help="How closely to follow the prompt."),
]
Sampler = Annotated[str | None, Option(help=SAMPLERS)]
Schedule = Annotated[str | None, Option(help=SCHEDULES)]
Size = Annotated[str | None, Option("--size", "-s", help="As 512x768, or 512 for a square.")]
Side = Annotated[int | None, Option(help="In pixels, a multiple of 8.")]
Seed = Annotated[int | None, Option(help="The same seed gives the same image.")]
Images = Annotated[int | None, Option("--images", "-n", help="How many; their seeds count up.")]
Like = Annotated[Path | None, Option(help="Take every setting from this image; other options override it.")]
Revision = Annotated[str | None, Option(help="Branch, tag or commit of a hub id.", rich_help_panel=_MODEL)]
Prediction = Annotated[
    str | None,
    Option(help="epsilon, v_prediction or sample, where a file does not say.", rich_help_panel=_MODEL),
]
Tokenizer = Annotated[Path | None, Option(help="A folder, for files that come without.", rich_help_panel=_MODEL)]
Decoder = Annotated[
    str | None,
    Option(help="tiny, or the name or folder of a tiny decoder: faster, with less detail.", rich_help_panel=_MACHINE),
]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print the paths written, and nothing else.")]

Init = Annotated[Path | None, Option(help="The image to start from.", rich_help_panel=_START)]
Strength = Annotated[
    float | None,
    Option(help="How much of it to change, 0 to 1 (else 0.8, with a mask 1).", rich_help_panel=_START),
]
Mask = Annotated[Path | None, Option(help="Change it only where this image is white.", rich_help_panel=_START)]

Refiner = Annotated[str | None, Option(help="A model that finishes the image.", rich_help_panel=_FINISH)]
Handoff = Annotated[
    float | None,
    Option(
        help="When it takes over, 0 to 1 (else 0.8); with --strength it regenerates the whole instead.",
        rich_help_panel=_FINISH,
    ),
]

Device = Annotated[str | None, Option(help="cpu, cuda, cuda:1, mps (else the best here).", rich_help_panel=_MACHINE)]
DType = Annotated[
    str | None,
    Option(help="float32, float16, bfloat16 (else the best here).", rich_help_panel=_MACHINE),
]
