"""Stable Diffusion 3 and 3.5 from their published weights: sampled, edited, fine-tuned on a folder of captions.

    python -m experiments.sd3 --mode=import --weights=stable-diffusion-3-medium-diffusers --workdir=runs/sd3
    python -m experiments.sd3 --workdir=runs/sd3 --mode=sample --prompt="An astronaut riding a horse" --num_samples=1
    python -m experiments.sd3 --workdir=runs/sd3 --mode=sample --prompt="a fox" --config.sampling.size="(512, 768)"
    python -m experiments.sd3 --init_from=runs/sd3 --workdir=runs/mine --config.data.dir=DIR
    python -m experiments.sd3 --init_from=runs/sd3 --workdir=runs/lora --config.data.dir=DIR --config.lora.rank=16

The weights are those of the folder that diffusers publishes. Without T5, import with
--config.condition.leave_out="('t5',)". Their licence may have to be accepted at their publisher first.
"""

from diffusion.runs.call import Task
from diffusion.runs.modes import main
from experiments.captions import evaluate, read, ready, score

TASK = Task("sd3", read, evaluate, ready, score)

if __name__ == "__main__":
    main(__file__, __doc__, TASK, config="sd3")
