"""The same CLIP in PyTorch (transformers' CLIPModel), timed on request: the other side of `benchmarks.clip`.

Runs in an interpreter that has torch and transformers and nothing of this project.
"""

import torch
import transformers
from turns_peer import DEVICE, make_parser, serve

SMALL = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
TINY = dict(
    projection_dim=16,
    vision_config=dict(**SMALL, image_size=32, patch_size=16),
    text_config=dict(
        **SMALL, vocab_size=99, max_position_embeddings=9, bos_token_id=97, eos_token_id=98, pad_token_id=98
    ),
)


def make(batch_size, dtype, tiny, compiled):
    """Returns a step of AdamW on the contrastive loss, and both towers with the similarities of all pairs.

    A step also averages the weights, as ours does.
    """
    config = transformers.CLIPConfig(**(TINY if tiny else {}))  # without arguments: ViT-B/32
    net = transformers.CLIPModel(config).to(DEVICE)
    size, text = config.vision_config.image_size, config.text_config
    image = torch.randn(batch_size, 3, size, size, device=DEVICE)
    ids = torch.randint(text.vocab_size - 2, (batch_size, text.max_position_embeddings), device=DEVICE)
    ids[:, -1] = text.vocab_size - 1
    optimizer = torch.optim.AdamW(net.parameters(), 5e-4, (0.9, 0.98), 1e-6, weight_decay=0.2, fused=True)
    parameters = [parameter.detach() for parameter in net.parameters()]
    average = [parameter.clone() for parameter in parameters]
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16")
    if compiled:
        net.compile()

    def train():
        net.train()
        with autocast:
            loss = net(input_ids=ids, pixel_values=image, return_loss=True).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(average, parameters, 1e-3)

    @torch.no_grad()
    def forward():
        net.eval()
        with autocast:
            net(input_ids=ids, pixel_values=image)

    return {"train": train, "forward": forward}


if __name__ == "__main__":
    parser = make_parser()
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    serve(
        lambda compiled: make(arguments.batch, arguments.dtype, arguments.tiny, compiled),
        {"transformers": transformers.__version__},
    )
