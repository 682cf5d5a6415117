"""Plain functions and constants that tests share."""

import torch

TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CLIP_MODES = ["encoder", "feature", "none"]


def make_inputs(lengths: list[int], clip_lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)

    def texts(sizes: list[int], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).long()
        ids = torch.randint(4, 58, mask.shape, generator=generator)
        return torch.where(mask.bool(), ids, pad), mask

    input_ids, attention_mask = texts(lengths, pad=1)
    clip_input_ids, clip_attention_mask = texts(clip_lengths, pad=59)
    clip_input_ids[torch.arange(batch), torch.tensor(clip_lengths) - 1] = 59  # CLIP pools at the end of the text
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
        "clip_input_ids": clip_input_ids,
        "clip_attention_mask": clip_attention_mask,
        "clip_pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
    }
