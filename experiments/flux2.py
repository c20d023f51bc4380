"""FLUX.2 [klein] from its published weights: text to picture, and pictures edited as a text says.

    python -m experiments.flux2 --mode=import --weights=FLUX.2-klein-4B --workdir=runs/klein
    python -m experiments.flux2 --workdir=runs/klein --mode=sample --prompt="A cat holding a sign" --num_samples=1
    python -m experiments.flux2 --workdir=runs/klein --mode=sample --prompt="a cat in a hat" --images=cat.png,hat.png
    python -m experiments.flux2 --init_from=runs/klein --workdir=runs/mine --config.data.dir=DIR
    python -m experiments.flux2 --init_from=runs/klein --workdir=runs/lora --config.data.dir=DIR --config.lora.rank=16

The weights are those of the folder that diffusers publishes: distilled to four steps without guidance, or the base
model, for 50 steps with guidance; fine-tuning begins best with the base one. Pictures are as large as the first of
--images, or as --config.sampling.size="(512, 768)" says. --config.space.preview=taef2 at the import has previews drawn
by FLUX.2's tiny autoencoder. The 4B model's licence is Apache-2.0, that of the 9B one non-commercial.

DIR holds pictures and captions.jsonl, as for experiments.captions. To learn edits, lines name what is edited, {"image":
"after.png", "caption": "...", "references": ["before.png"]}, all as many: --config.data.references=1.
"""

from diffusion.runs.call import Task
from diffusion.runs.modes import main
from experiments.captions import evaluate, read, ready, score

TASK = Task("flux2", read, evaluate, ready, score)

if __name__ == "__main__":
    main(__file__, __doc__, TASK, config="flux2")
