"""A tiny model with random weights, and an input for it, of any family of transformers.

A family is a package of transformers.models. Its configuration's sizes are cut down by their names,
in several ways until one can be built and run; there are no files to download.
"""

import functools
import importlib.util
import inspect
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from tests.torch.tiny_inputs import WORDS, inputs

# Which class stands for a model: the first of these mappings of the Auto classes that knows it.
HEADS = ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "VISUAL_QUESTION_ANSWERING", "RETRIEVAL",
         "ZERO_SHOT_IMAGE_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION", "SPEECH_SEQ_2_SEQ", "CTC",
         "RNNT", "TDT", "AUDIO_CLASSIFICATION", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM",
         "AUDIO_TOKENIZATION", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM",
         "SEQUENCE_CLASSIFICATION", "QUESTION_ANSWERING", "IMAGE_CLASSIFICATION",
         "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "DEPTH_ESTIMATION",
         "MASK_GENERATION", "VIDEO_CLASSIFICATION", "POSE_ESTIMATION", "IMAGE_TO_IMAGE",
         "IMAGE_MATTING", "MASKED_IMAGE_MODELING", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING",
         "TEXT_RECOGNITION", "TABLE_RECOGNITION", "IMAGE", "PRETRAINING",
         "TIME_SERIES_PREDICTION", "DECISION", "BACKBONE", "")
MOST = 10_000_000                         # parameters: what is larger has not been made tiny
VOCABULARY = 128


class NotBuilt(Exception):
    """Why a family could not be tried."""


def families() -> list[str]:
    """Every package of transformers.models that holds a model."""
    root = Path(importlib.util.find_spec("transformers.models").origin).parent
    return sorted({p.parent.name for p in root.glob("*/modeling_*.py")} - {"auto", "deprecated"})


@functools.cache
def _model_types():
    """{package: its model types}, the one that is called like the package first."""
    found = {}
    for model_type in CONFIG_MAPPING.keys():
        found.setdefault(model_type_to_module_name(model_type), []).append(model_type)
    return {package: sorted(names, key=lambda n: n.replace("-", "_") != package)
            for package, names in found.items()}


def classes(family: str) -> Iterator[tuple[str, str]]:
    """(model type, name of the class) for all models of the family, the whole before its parts."""
    for model_type in _model_types().get(family, ()):
        if name := next(filter(None, (_class_in(head, model_type) for head in HEADS)), None):
            yield model_type, name


def _class_in(head, model_type):
    """The class that one of the Auto classes' mappings has for a model type, or None."""
    for mapping in (f"MODEL_FOR_{head}_MAPPING_NAMES", f"MODEL_FOR_{head}_NAMES",
                    f"MODEL_{head}_MAPPING_NAMES".replace("__", "_")):
        if found := getattr(modeling_auto, mapping, {}).get(model_type):
            return found if isinstance(found, str) else found[0]
    return None


# --- the configuration ----------------------------------------------------------------------------

def sizes(hidden: int, kv: int, image: int) -> list[tuple[str, int]]:
    """(what the name of a setting ends in, its largest value); the first that fits counts."""
    return [
        (r"vocab(ulary)?_size|vocab_size_\w+|type_vocab_size|num_embeddings", VOCABULARY),
        (r"kv_heads|key_value_heads|num_kv_heads|query_groups", kv),
        (r"n_groups?|topk_group|mamba_n_groups|num_expert_group", 1),
        (r"upsample_groups", hidden),
        (r"codebook_size|num_filters", 16),
        (r"top_?k\w*|experts_per_tok\w*|moe_k|num_selected_experts", 2),
        (r"experts|expert_num|num_local_experts", 4),
        (r"lora_rank|_rank|lora_dim", 8),
        (r"rotary_dim", hidden // 8),
        (r"feat_extract_layers|mask_min_masks", 99),
        (r"mamba_(d_head|head_dim|headdim)|mamba_head_dim", hidden // 2),
        (HEAD_DIM, hidden // 4),
        (r"heads?|n_head|num_head", 4),
        (r"(layers?|layers_\w+|depths?|num_blocks|num_hidden_groups|repeats?|n_layer)", 2),
        (r"intermediate_size\w*|ffn_dim|d_ff|n_inner|mlp_dim|ffn_hidden_size|mlp_hidden_size"
         r"|feed_forward_(size|dim)|inner_dim|ffn_size|dim_feedforward|feedforward_dim|ff_dim"
         r"|intermediate_dim|ffn_hidden_dim|mlp_intermediate\w*|d_inner", 2 * hidden),
        (r"hidden_size\w*|hidden_dim|d_model|embed_dim|n_embd|dim|embedding_size|width|embed_size"
         r"|projection_size|hidden_channels|emb_dim|dimension|projector_hidden_size|d_embed"
         r"|lru_width|d_\w*model|channels_dim|output_channels|encoder_hidden|decoder_channels"
         r"|embedding_dim|embed_dims|hidden|embedding_channels|base_channels|initial_channel", hidden),
        (r"(image|img|input)_size", image),
        (r"patch_size", 8),
        (r"num_frames|frames_per_clip", 4),
        (r"max_source_positions", 64),
        (r"position_embeddings|positions|max_seq_len|max_sequence_length|seq_length", 256),
        (r"num_mel_bins|feature_size|num_mels|n_mels|input_feat_per_channel", 16),
        (r"d_state|state_size|mamba_state_dim", 8),
        (r"num_queries|query_tokens|num_query\w*|num_latents|max_n_pages", 8),
        (r"window_size", 4),
        (r"chunk_size|attention_window|sliding_window|block_length", 16),
        (r"num_buckets|bucket_count|hash_buckets", 64),
    ]


HEAD_DIM = r"head_dim|d_kv|kv_channels|head_size|d_head|head_k_dim|head_v_dim"
SECTIONS = r"qwen2_vl|qwen2_5_vl|glm4v|glm46v|glm_ocr"                # of their rotary embeddings
LISTS = {r"depths?|layers?|num_blocks|repeats": 1, r"heads?": 1, r"hash_buckets": 16,
         r"(hidden_sizes?|dims?|channels|sizes|features|embed_dims|conv_dim|widths?)": 16}
TRIES = [(32, 2, 64), (32, 4, 64), (64, 4, 64), (32, 2, 224)]            # hidden, kv, image
NEVER = r"layerdrop|dropout|mask_(time|feature)_prob|drop_path_rate|\w*_dropout|\w*layer_drop"
OFF = r"use_cache|apply_spec_augment|use_mamba_kernels|return_dict_in_generate|output_\w+"

NONE = ("head_dim", "vocab_size", "num_key_value_heads")              # no default: give one

# What no rule gets right, by model type.
SPECIAL = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "bit": {"embedding_size": 32, "num_groups": 4},
    "esm": {"pad_token_id": 0, "mask_token_id": WORDS},
    "hgnet_v2": {"hidden_sizes": [32, 64, 128, 256], "stem_channels": [3, 16, 16], "stage_in_channels": [16, 32, 64, 128],
                 "stage_mid_channels": [16] * 4, "stage_out_channels": [32, 64, 128, 256]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "zoedepth": {"bottleneck_features": 32},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}


def shrink(settings: dict, rules: list, model_type: str = "") -> dict:
    """The settings, of a configuration and of those in it, that must change to make it tiny."""
    new = {}
    for key, value in settings.items():
        if isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
            new[key] = shrink(value, rules, value.get("model_type", ""))
            if "model_type" in value:
                new[key]["model_type"] = value["model_type"]
        elif re.fullmatch(r"\w*token_(id|index|ids|id_list)|(bos|eos|pad)\w*_id", key):
            if type(value) is int:
                new[key] = token(key)
            elif isinstance(value, (list, tuple)) and value and type(value[0]) is int:
                new[key] = [token(key)]
        elif isinstance(value, dict) and ("mrope_section" in value or key == "rope_parameters"
                                          and re.match(SECTIONS, model_type)):
            eighth = dict(rules)[HEAD_DIM] // 8
            new[key] = value | {"mrope_section": [2 * eighth, eighth, eighth]}
        elif value is None and key in NONE:
            new[key] = next(most for ends, most in rules if re.fullmatch(rf"(\w*_)?({ends})", key))
        elif isinstance(value, bool):
            if value and re.fullmatch(OFF, key):
                new[key] = False
            elif key == "reshape_hidden_states":              # the outer one's choice for the inner
                new[key] = value
        elif isinstance(value, float) and re.fullmatch(NEVER, key):
            new[key] = 0.0
        elif isinstance(value, int):
            limit = next((most for ends, most in rules if re.fullmatch(rf"(\w*_)?({ends})", key)),
                         value)
            if value > limit:
                new[key] = limit
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            least = next((n for ends, n in LISTS.items()
                          if re.fullmatch(rf"(\w*_)?({ends})", key)), None)
            if re.fullmatch(r"\w*(image|img|input)_size", key):
                new[key] = [min(v, dict(rules)[r"(image|img|input)_size"]) for v in value]
            elif least and min(value) >= least // 2 and min(value):
                depth = "depth" in key or "layers" in key or "blocks" in key
                new[key] = [1 if depth else v // min(value) * least for v in value]
    if len(settings.get("out_indices") or ()) == 4 and settings.get("num_hidden_layers", 0) > 4:  # a neck reads them
        new |= {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4],
                "out_features": [f"stage{i}" for i in range(1, 5)]}
    return new | SPECIAL.get(model_type, {})


def token(key: str) -> int:
    """A number for a special token, the same wherever its name is the same."""
    common = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1}
    return next((n for name, n in common.items() if key.startswith(name)),
                WORDS + zlib.crc32(re.sub("_(id|index|ids)$", "", key).encode()) % (
                    VOCABULARY - WORDS))


def modality(model: nn.Module) -> str:
    """What its forward takes: text, vision, audio, several (multimodal), or other."""
    takes = inspect.signature(type(model).forward).parameters
    found = {kind for name, kind in {"input_ids": "text", "pixel_values": "vision",
                                     "pixel_values_videos": "vision", "input_features": "audio",
                                     "input_values": "audio"}.items() if name in takes}
    return "multimodal" if len(found) > 1 else found.pop() if found else "other"


def build(model_type: str, name: str, hidden: int, kv: int, image: int) -> nn.Module:
    """The model with random weights, in evaluation mode; NotBuilt if it is not tiny."""
    kind = CONFIG_MAPPING[model_type]
    changes = shrink(kind().to_dict(), sizes(hidden, kv, image), model_type)
    config = kind(**changes)
    cls = getattr(transformers, name)
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(config).parameters())
    except Exception:                       # it computes while it is built: build it for real
        count = 0
    if count > MOST:
        raise NotBuilt(f"its smallest configuration here has {count / 1e6:.0f} million numbers")
    torch.manual_seed(0)
    model = cls(config).eval()
    for path, p in model.named_parameters():
        if re.search(r"layer_?scale|gamma|lambda", path) and 0 < p.abs().max() < 1e-3:
            nn.init.constant_(p, 0.5)                               # else the layers change nothing
        if p.numel() and not p.abs().max() < 1e4:      # no values of its own
            nn.init.normal_(p, std=0.05)
    for path, sums in model.named_buffers():
        if path.endswith("embed_sum"):                 # codebooks that training would fill
            nn.init.normal_(sums)
    return model.float()


@torch.no_grad()
def outputs(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """Every tensor of numbers that the model gives, in evaluation mode, and with one seed."""
    torch.manual_seed(0)
    return floats(model.eval()(**given))


def floats(found) -> list[Tensor]:
    """Every tensor of floating-point numbers in a model's output, in order."""
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() and found.numel() else []
    if isinstance(found, dict):
        found = list(found.values())
    return [t for part in found for t in floats(part)] if isinstance(found, (list, tuple)) else []


def make(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """(a tiny model, an input that it takes), or NotBuilt with the first error."""
    reasons = []
    for model_type, name in classes(family):
        for shape in TRIES:
            try:
                model = build(model_type, name, *shape)
                for given in inputs(model):
                    if reason := _unfit(model, given):
                        reasons.append(reason)
                    else:
                        return model, given
            except TimeoutError:
                raise
            except ImportError as error:                     # other sizes need the package too
                reasons.append(f"ImportError: {error}")
                break
            except Exception as error:
                reasons.append(error if isinstance(error, NotBuilt) else
                               f"{type(error).__name__}: {error}")
    raise NotBuilt(reasons[0] if reasons else "it takes no input of a kind that is tried here"
                   if any(classes(family)) else "no Auto class has a model of it")


def _unfit(model, given):
    """Why nothing can be learned from this input, or None."""
    try:
        found, again = outputs(model, given), outputs(model, given)
    except TimeoutError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not found:
        return "it gives no tensor of numbers"
    if not all(torch.isfinite(t).all() for t in found):
        return "its outputs are NaN or infinite"
    if not all(torch.equal(*pair) for pair in zip(found, again)):
        return "its outputs are not the same from call to call"
    return None
