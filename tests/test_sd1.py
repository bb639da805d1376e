"""Names are data: they are held against diffusers' own UNet and its own LDM conversion."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from support import checkpoint_models as models

from sdd_lora import sd1 as names


def unet_of(widths: names.Widths, in_channels: int = 4) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(
            in_channels=in_channels,
            block_out_channels=widths.blocks,
            attention_head_dim=8,
            cross_attention_dim=widths.context,
            norm_num_groups=16,
        )


@pytest.mark.parametrize(
    ("widths", "in_channels"), [(names.SD15, 4), (names.SD15, 9), (names.DEMO, 4)]
)
def test_the_tables_are_the_unets_linear_and_convolution_modules(widths, in_channels):
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    expected = {
        name: tuple(module.weight.shape)
        for name, module in unet_of(widths, in_channels).named_modules()
        if isinstance(module, kinds)
    }
    assert names.unet_shapes(widths, in_channels) == expected


def test_ldm_names_agree_with_diffusers_own_conversion():
    """diffusers converts an LDM UNet; every parameter must land where `from_ldm` says."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = unet_of(names.SD15)
    marks = {name: torch.tensor(float(i)) for i, name in enumerate(unet.state_dict())}
    ldm = {names.LDM_UNET_PREFIX + names.to_ldm(name): mark for name, mark in marks.items()}
    assert len(ldm) == len(marks)
    assert convert_ldm_unet_checkpoint(ldm, dict(unet.config)) == marks
    assert all(names.from_ldm(names.to_ldm(name)) == name for name in marks)


def test_there_are_64_matrices_of_16_places():
    shapes = models.cross_attention_shapes()
    assert len(names.PLACES) == 16
    assert len(shapes) == 64
    per_rank = dict.fromkeys(names.ATTENTION_LEAVES, 0)
    for name, (out, wide_in) in shapes.items():
        per_rank[name.rpartition("attn2.")[2]] += out + wide_in
    assert per_rank["to_k"] + per_rank["to_v"] == 49_536
    assert sum(per_rank.values()) == 99_456


def test_one_module_in_every_scheme():
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
    assert names.kohya_stem(name) == (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0"
    )
    assert names.ldm_stem(name) == (
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_out_0"
    )
    assert names.peft_stem(name) == f"unet.{name}"
    assert names.attn_procs_stem(name) == (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora"
    )
    key = models.checkpoint_key(name)
    assert key == (
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.weight"
    )
    assert names.ema_keys(key) == (
        "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn2to_out0weight",
        "model_ema.input_blocks11transformer_blocks0attn2to_out0weight",
    )


def test_every_stem_leads_back_to_its_module():
    for name in names.known_modules():
        for spell in (names.kohya_stem, names.ldm_stem, names.peft_stem):
            assert names.parse_stem(spell(name)) == name
        if names.is_attention(name):
            stem = names.attn_procs_stem(name)
            assert (
                names.parse_stem(stem.removesuffix("_lora").removesuffix(".lora_linear_layer"))
                == name
            )
    assert names.parse_stem("text_encoder.encoder.layers.3.mlp.fc1") == (
        "text_encoder.text_model.encoder.layers.3.mlp.fc1"
    )
    assert names.parse_stem("lora_unet_down_blocks_3_attentions_0_proj_in") is None


def test_no_two_modules_share_a_stem():
    stems = [
        spell(n) for n in names.known_modules() for spell in (names.kohya_stem, names.peft_stem)
    ]
    assert len(set(stems)) == len(stems)


def test_a_path_outside_the_model_is_refused():
    with pytest.raises(KeyError, match=r"down_blocks\.3\.attentions"):
        names.to_ldm("down_blocks.3.attentions.0.proj_in")
