"""Inputs that a tiny model of any family may take: words, pictures, films and sounds."""

import inspect
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

WORDS = 60                                # words are below 60, special tokens at 60 and above


def setting(config, *names, default=None):
    """The first of these settings that the configuration, or one in it, has."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
    parts += [v for part in parts[1:] for v in vars(part).values() if hasattr(v, "to_dict")]
    return next((value for part in parts for name in names
                 if (value := getattr(part, name, None)) is not None), default)


def inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inputs that the model may take, the richest first."""
    takes = inspect.signature(type(model).forward).parameters
    words = torch.arange(24).reshape(2, 12) * 2 % (WORDS - 5) + 5
    text = {"input_ids": words} if "input_ids" in takes else {}
    if "bbox" in takes:
        text["bbox"] = torch.zeros(2, 12, 4, dtype=torch.long)
    if "qformer_input_ids" in takes:
        text["qformer_input_ids"] = words
    answer = {"decoder_input_ids": words[:, :6]} if "decoder_input_ids" in takes else {}
    for seen in media(model, takes):
        extra = text
        if text and (n := features(model, seen)):
            special = setting(model.config, *(("audio_token_id", "audio_token_index")
                                              if "input_features" in seen else
                                              ("image_token_id", "image_token_index")))
            if special is not None:
                places = torch.full((2, n), special)
                ids = {"input_ids": torch.cat([words, places, words], 1)}
                if "mm_token_type_ids" in takes:
                    ids["mm_token_type_ids"] = (ids["input_ids"] == special).long()
                yield seen | text | ids | answer
        if "mm_token_type_ids" in takes and text:
            extra = extra | {"mm_token_type_ids": torch.zeros_like(text["input_ids"])}
        yield seen | extra | answer
        if extra:
            yield seen | answer
    if text:
        yield text | answer
        yield text


def media(model, takes):
    """Pictures, films and sounds, in the shapes that models of transformers take."""
    config, draw = model.config, torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=draw)
    channels = setting(config, "num_channels", "in_channels", "in_chans", default=3)
    size = setting(config, "image_size", "img_size", "input_size", default=64)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if "pixel_values" in takes:
        if "image_grid_thw" in takes:
            patch = setting(config, "patch_size", default=8)
            numbers = channels * patch**2 * setting(config, "temporal_patch_size", default=1)
            grid = {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}
            yield {"pixel_values": noise(32, numbers)} | grid
        picture = noise(2, channels, height, width)
        yield {"pixel_values": picture}
        yield {"pixel_values": picture[:, None]}
        if "image_sizes" in takes:
            sizes_ = torch.tensor([[height, width]] * 2)
            yield {"pixel_values": picture, "image_sizes": sizes_}
            yield {"pixel_values": picture[:, None].repeat(1, 5, 1, 1, 1), "image_sizes": sizes_}
        frames = setting(config, "num_frames", "frames_per_clip", default=4)
        yield {"pixel_values": noise(2, frames, channels, height, width)}
        for other in (64, 128, 224, 256):
            if other != height:
                yield {"pixel_values": noise(2, channels, other, other)}
    if "past_values" in takes:
        yield {"past_values": noise(2, setting(config, "context_length", default=32),
                                    setting(config, "num_input_channels", default=1))}
    if "pixel_values_videos" in takes:
        frames = setting(config, "num_frames", "frames_per_clip", default=4)
        yield {"pixel_values_videos": noise(2, frames, channels, height, width)}
    if "input_features" in takes:
        mel = setting(config, "num_mel_bins", "feature_size", "n_mels", "input_dim", "num_mels",
                      "input_feat_per_channel", "hidden_size", default=16)
        long = 2 * setting(config, "max_source_positions", default=32)
        for length in (long, 64, 200):
            whole = torch.ones(2, length, dtype=torch.long)
            for mask in ({}, *({name: whole} for name in ("input_features_mask",
                                                          "feature_attention_mask",
                                                          "attention_mask") if name in takes)):
                yield {"input_features": noise(2, mel, length)} | mask
                yield {"input_features": noise(2, length, mel)} | mask
    if "input_values" in takes:
        yield {"input_values": noise(2, 4000)}
        yield {"input_values": noise(2, 1, 4000)}
        mel = setting(config, "num_mel_bins", default=16)
        yield {"input_values": noise(2, setting(config, "max_length", default=64), mel)}
        yield {"input_values": noise(2, 40, mel)}


@torch.no_grad()
def features(model, seen):
    """How many rows of the text each of the two pictures or sounds takes the place of."""
    ask = getattr(model, "get_audio_features" if "input_features" in seen else
                  "get_image_features", None) or \
        getattr(getattr(model, "model", None), "get_image_features", None)
    if ask is None:
        return 0
    try:
        found = ask(**seen)
    except Exception:                       # another shape may do
        return 0
    found = getattr(found, "pooler_output", found)
    if isinstance(found, (list, tuple)):
        found = [t.reshape(-1, t.shape[-1]) for t in found if isinstance(t, Tensor)]
        found = torch.cat(found) if found else None
    return math.prod(found.shape[:-1]) // 2 if isinstance(found, Tensor) else 0
