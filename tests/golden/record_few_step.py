"""Records few_step.npz: losses and gradients of the released MeanFlow, iMF and ECT, and pi-Flow's policy.

Clone Gsunshine/meanflow (d70cb55), Lyy-iiis/imeanflow (bf60cd7), locuslab/ect (4311059) and Lakonik/piFlow (4229541)
into one folder, and run twice, each run adding its half:

    python tests/golden/record_few_step.py FOLDER jax       # with JAX and Flax
    python tests/golden/record_few_step.py FOLDER torch     # with PyTorch

The networks are toys of seeded weights. What the released code draws (times, noise, scales of guidance) is given to it.
"""

import importlib
import pathlib
import sys
import types

import numpy as np

HERE = pathlib.Path(__file__).parent
SHAPE, NUM_CLASSES = (6, 2, 2, 1), 3


def seeded(num_times: int, seed: int, outputs: int = 4) -> dict[str, np.ndarray]:
    """Weights of the toy: tanh([x, times] @ in) @ out."""
    random = np.random.RandomState(seed)
    return {"in": random.randn(4 + num_times, 8) / 2, "out": random.randn(8, outputs) / 2}


def drawn(seed: int) -> dict[str, np.ndarray]:
    """Images, labels, noise and times, of which a third has r = t."""
    random = np.random.RandomState(seed)
    size = SHAPE[0]
    r, t = np.sort(random.uniform(0.05, 0.95, (2, size)), axis=0)
    r = np.where(np.arange(size) < size // 3, t, r)
    labels = random.randint(NUM_CLASSES, size=size).astype(np.int32)
    return {"x_0": random.randn(*SHAPE), "eps": random.randn(*SHAPE), "labels": labels, "r": r, "t": t}


def stub(name: str, **contents: object) -> types.ModuleType:
    """Puts a module of this name in the place of one that the released code imports."""
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    return module


def record_jax(folder: pathlib.Path) -> dict[str, np.ndarray]:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)

    class Toy(nn.Module):
        head: bool = False
        class_dropout_prob: float = 0.0

        @nn.compact
        def __call__(self, x, *rest, train=False, key=None):
            w_in, w_out = (self.get_variable("params", name) for name in ("in", "out"))
            inputs = jnp.concatenate([x.reshape(len(x), -1), *(number.reshape(-1, 1) for number in rest)], axis=1)
            output = (jnp.tanh(inputs @ w_in) @ w_out).reshape(len(x), -1, 4)
            halves = [output[:, i].reshape(x.shape) for i in range(output.shape[1])]
            return tuple(halves) if self.head else halves[0]

    def given(module, values: dict[str, np.ndarray]) -> None:
        """Lets the released module draw `eps` for its noise."""
        random = types.SimpleNamespace(
            normal=lambda key, shape, dtype: jnp.asarray(values["eps"]), uniform=jax.random.uniform
        )
        module.jax = types.SimpleNamespace(random=random, jvp=jax.jvp, lax=jax.lax)

        def clip(x, a_min, a_max):
            return jnp.clip(x, a_min, a_max)  # later versions of JAX name them otherwise

        module.jnp = types.SimpleNamespace(**{**vars(jnp), "clip": clip})

    def run(model, values, weights):
        def loss(weights):
            arguments = jnp.asarray(values["x_0"]), jnp.asarray(values["labels"])
            rngs = {"gen": jax.random.key(0)}
            return model.apply({"params": {"net": weights}}, *arguments, rngs=rngs, method=model.forward)[0]

        value, gradient = jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, weights))
        return {"loss": value, "grad/in": gradient["in"], "grad/out": gradient["out"]}

    def column(x):
        return jnp.asarray(x)[:, None, None, None]

    stub("models", models_dit=stub("models.models_dit", toy=lambda name, class_dropout_prob: Toy(name=name)))
    sys.path.insert(0, str(folder / "meanflow"))
    released = importlib.import_module("meanflow")
    found = {}
    for name, options in {
        "cifar10": dict(guidance_eq="", norm_p=0.75, norm_eps=1e-3),
        "guided": dict(omega=1.0, kappa=0.5, norm_p=1.0, norm_eps=1e-2),
        "omega": dict(omega=2.0, kappa=0.0, norm_p=0.0, norm_eps=1e-2),
    }.items():
        values, weights = drawn(0), seeded(3, 1)
        given(released, values)

        class Given(released.MeanFlow):
            dtype = jnp.float64

            def sample_tr(self, bz):
                return column(values["t"]), column(values["r"])  # noqa: B023

        settings = dict(model_str="toy", model_config={}, num_classes=NUM_CLASSES, class_dropout_prob=0.0)
        answers = run(Given(**settings, **options), values, weights)
        found |= {f"mean_flow/{name}/{key}": value for key, value in answers.items()}
    found |= {f"mean_flow/drawn/{key}": value for key, value in values.items()}
    found |= {f"mean_flow/weights/{key}": value for key, value in weights.items()}

    sys.modules["models"].imfDiT = stub("models.imfDiT", toy=None, imfDiT=object)
    vars(sys.modules["models.imfDiT"])["toy"] = lambda name, num_classes, eval: Toy(name=name, head=True)
    sys.path.insert(0, str(folder / "imeanflow"))
    released = importlib.import_module("imf")
    values, weights = drawn(2), seeded(6, 3, outputs=8)
    given(released, values)
    random = np.random.RandomState(4)
    equal = values["r"] == values["t"]
    values["omega"] = random.uniform(1, 8, SHAPE[0])
    values["first"] = np.where(equal, 0.0, random.uniform(0, 0.5, SHAPE[0]))
    values["last"] = np.where(equal, 1.0, random.uniform(0.5, 1, SHAPE[0]))

    class GivenToo(released.iMeanFlow):
        dtype = jnp.float64

        def sample_tr(self, bz):
            return column(values["t"]), column(values["r"]), column(equal)

        def sample_cfg_scale(self, bz):
            return column(values["omega"])

        def sample_cfg_interval(self, bz, fm_mask=None):
            return column(values["first"]), column(values["last"])

    answers = run(GivenToo(model_str="toy", num_classes=NUM_CLASSES, class_dropout_prob=0.0), values, weights)
    found |= {f"imf/{key}": value for key, value in answers.items()}
    found |= {f"imf/drawn/{key}": value for key, value in values.items()}
    return found | {f"imf/weights/{key}": value for key, value in weights.items()}


def record_torch(folder: pathlib.Path) -> dict[str, np.ndarray]:
    import torch

    torch.set_default_dtype(torch.float64)
    stub("torch_utils")
    sys.modules["torch_utils"].persistence = stub("torch_utils.persistence", persistent_class=lambda cls: cls)
    sys.modules["torch_utils"].distributed = stub("torch_utils.distributed", print0=lambda *_: None)
    torch.cuda.get_rng_state = lambda: None
    torch.cuda.set_rng_state = lambda _: None
    sys.path.insert(0, str(folder / "ect"))
    released = importlib.import_module("training.loss")
    random = np.random.RandomState(5)
    x_0, eps, normal = random.randn(*SHAPE), random.randn(*SHAPE), random.randn(SHAPE[0])
    weights = seeded(1, 6)
    found = {"ect/x_0": x_0, "ect/eps": eps, "ect/t": np.exp(2.0 * normal - 1.1)}
    found |= {f"ect/weights/{key}": value for key, value in weights.items()}
    torch.randn = lambda *_, **__: torch.from_numpy(normal)[:, None, None, None]
    torch.randn_like = lambda _: torch.from_numpy(eps)

    for name, stage, options in [
        ("first", 0, {}),
        ("third", 2, {}),
        ("late", 7, dict(c=0.03)),
        ("hour", 0, dict(q=256)),
    ]:
        own = {key: torch.tensor(value, requires_grad=True) for key, value in weights.items()}

        def net(x, sigma, labels, augment_labels=None, own=own):
            inputs = torch.cat([x.reshape(len(x), -1), sigma.reshape(-1, 1)], dim=1)
            return (torch.tanh(inputs @ own["in"]) @ own["out"]).reshape(x.shape)

        loss = released.ECMLoss(**options)
        loss.update_schedule(stage)
        value = loss(net, torch.from_numpy(x_0))
        value.mean().backward()
        found |= {f"ect/{name}/loss": value.detach(), f"ect/{name}/r": loss.t_to_r(torch.tensor(found["ect/t"]))}
        found |= {f"ect/{name}/grad/{key}": weight.grad for key, weight in own.items()}

    policies = folder / "piFlow/lakonlab/models/diffusions/piflow_policies"
    stub("policies").__path__ = [str(policies)]
    DXPolicy = importlib.import_module("policies.dx").DXPolicy
    random = np.random.RandomState(7)
    velocities, x, x_t = random.randn(4, 5, 2, 2, 1), random.randn(4, 2, 2, 1), random.randn(4, 2, 2, 1)
    found |= {"policy/velocities": velocities, "policy/x": x, "policy/x_t": x_t}
    for name, shift in (("even", 1.0), ("shifted", 3.2)):
        raw_t, raw_r = np.asarray([1.0, 0.9, 0.5, 0.5]), np.asarray([0.5, 0.4, 0.0, 0.0])
        raw = raw_r[:, None] + (raw_t - raw_r)[:, None] * np.arange(5) / 4  # at the values
        raw = raw[:, 1:]  # t > 0
        if name == "even":
            raw = np.concatenate([raw, raw - 0.05], axis=1)  # and between them

        def shifted(raw):
            return shift * raw / (1 + (shift - 1) * raw)  # noqa: B023

        policy = DXPolicy(*map(torch.from_numpy, (velocities, x_t, shifted(raw_t))), segment_size=0.5, shift=shift)
        times = shifted(raw)
        found |= {
            f"policy/{name}/t": shifted(raw_t),
            f"policy/{name}/r": shifted(raw_r),
            f"policy/{name}/times": times,
            f"policy/{name}/velocity": np.stack(
                [policy.pi(torch.from_numpy(x), torch.from_numpy(time)).numpy() for time in times.T], axis=1
            ),
        }
    return found


if __name__ == "__main__":
    path, kept = HERE / "few_step.npz", {}
    halves = {"jax": (record_jax, ("mean_flow/", "imf/")), "torch": (record_torch, ("ect/", "policy/"))}
    record, own = halves[sys.argv[2]]
    if path.exists():
        stored = np.load(path)
        kept = {name: stored[name] for name in stored.files if not name.startswith(own)}
    np.savez_compressed(
        path, **kept, **{name: np.asarray(value) for name, value in record(pathlib.Path(sys.argv[1])).items()}
    )
