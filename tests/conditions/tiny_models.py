"""Tiny models of random weights, saved as users' models are: the loading code cannot tell."""

from pathlib import Path

import numpy as np
import torch
import transformers as t
from tests import tiny


def _save(folder: Path, network, processor) -> str:
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def dpt(folder: Path) -> str:
    """Relative inverse depth, as MiDaS."""
    torch.manual_seed(0)
    config = t.DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    processor = t.DPTImageProcessor(size={"height": 32, "width": 32}, ensure_multiple_of=16)
    return _save(folder, t.DPTForDepthEstimation(config), processor)


def glpn(folder: Path) -> str:
    """Metric depth, larger for what is farther."""
    torch.manual_seed(1)
    config = t.GLPNConfig(
        num_encoder_blocks=4,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 8, 8],
        num_attention_heads=[1, 1, 1, 1],
        sr_ratios=[8, 4, 2, 1],
        decoder_hidden_size=8,
    )
    return _save(folder, t.GLPNForDepthEstimation(config), t.GLPNImageProcessor())


def segformer(folder: Path, classes: int = 150) -> str:
    """Semantic segmentation."""
    torch.manual_seed(2)
    config = t.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[8, 8],
        num_attention_heads=[1, 1],
        sr_ratios=[4, 2],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=classes,
    )
    processor = t.SegformerImageProcessor(size={"height": 32, "width": 32})
    return _save(folder, t.SegformerForSemanticSegmentation(config), processor)


def maskformer(folder: Path, classes: int = 133) -> str:
    """Panoptic segmentation."""
    torch.manual_seed(3)
    backbone = t.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = t.MaskFormerConfig(
        backbone_config=backbone,
        num_labels=classes,
        fpn_feature_size=32,
        mask_feature_size=32,
        decoder_config=t.DetrConfig(
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            num_queries=5,
        ),
    )
    processor = t.MaskFormerImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    return _save(folder, t.MaskFormerForInstanceSegmentation(config), processor)


def eomt(folder: Path) -> str:
    """Segmentation, of images that its processor cuts into squares."""
    torch.manual_seed(5)
    config = t.EomtConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        num_queries=4,
        num_blocks=1,
        num_upscale_blocks=1,
        num_labels=150,
        mlp_ratio=1,
    )
    size = {"shortest_edge": 32, "longest_edge": None}
    processor = t.EomtImageProcessor(size=size, do_split_image=True, do_pad=False)
    return _save(folder, t.EomtForUniversalSegmentation(config), processor)


def onnx_edges(file: Path, weight: float = 4.0, last: str = "Sigmoid") -> str:
    """An edge model by ONNX, for any size: the last node's function of weight * (red - its 3x3 mean)."""
    from onnx import TensorProto, helper, numpy_helper, save

    kernel = np.zeros((1, 3, 3, 3), np.float32)
    kernel[0, 0] = -1 / 9
    kernel[0, 0, 1, 1] += 1
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "kernel"], ["logits"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            helper.make_node(last, ["logits"], ["edges"]),
        ],
        "edges",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "h", "w"])],
        [helper.make_tensor_value_info("edges", TensorProto.FLOAT, [1, 1, "h", "w"])],
        [numpy_helper.from_array(weight * kernel, "kernel")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), file)
    return str(file)


def clip(folder: Path) -> str:
    """A CLIP of images and texts, 12 numbers each."""
    torch.manual_seed(0)
    tokenizer = tiny.sd15().tokenizer
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = t.CLIPModel(
        t.CLIPConfig(
            text_config=small | {"vocab_size": len(tokenizer), "max_position_embeddings": 77},
            vision_config=small | {"image_size": 32, "patch_size": 16},
            projection_dim=12,
        )
    )
    network.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    t.CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
