"""FLUX.2 [klein] from its published weights: text to picture, and pictures edited as a text says.

    python -m experiments.flux2 --mode=import --weights=FLUX.2-klein-4B --workdir=runs/klein
    python -m experiments.flux2 --workdir=runs/klein --mode=sample --prompt="A cat holding a sign" --num_samples=1
    python -m experiments.flux2 --workdir=runs/klein --mode=sample --prompt="a cat in a hat" --images=cat.png,hat.png

The weights are those of the folder that diffusers publishes: distilled to four steps without guidance, or the base
model, for 50 steps with guidance. Pictures are as large as the first of --images, or as
--config.sampling.size="(512, 768)" says. The 4B model's licence is Apache-2.0, that of the 9B one non-commercial.
"""

from diffusion.runs.call import Task
from diffusion.runs.modes import main
from experiments.captions import evaluate, read, ready, score

TASK = Task("flux2", read, evaluate, ready, score)

if __name__ == "__main__":
    main(__file__, __doc__, TASK, config="flux2")
