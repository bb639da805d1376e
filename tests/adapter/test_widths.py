"""The model that an adapter's shapes speak of."""

import pytest
from support.adapter_making import KINDS, shapes

from sdd_lora import sd1 as names
from sdd_lora.adapter.widths import fits, require_one_model
from sdd_lora.errors import BadInput

OTHER = names.Widths((48, 96, 160, 192), 64)


@pytest.mark.parametrize("widths", [names.SD15, names.DEMO, OTHER], ids=str)
def test_every_module_of_a_model_passes_alone_and_with_all_others(widths):
    known = shapes(widths)
    require_one_model(known)
    require_one_model(names.unet_shapes(widths, in_channels=9))
    for name, shape in known.items():
        require_one_model({name: shape})
    assert fits(known, widths)
    assert [fits(known, other) for other in (names.SD15, names.DEMO)].count(True) == (
        widths is not OTHER
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("side", [0, 1])
def test_one_wrong_side_among_all_is_named(name, side):
    known = shapes(OTHER)
    wrong = list(known[name])
    wrong[side] += 1
    with pytest.raises(BadInput, match=rf"^{name}: .*no model for this adapter"):
        require_one_model(known | {name: tuple(wrong)})


def test_matrices_of_two_models_are_no_adapter():
    mixed = shapes(names.DEMO) | {
        name: shape for name, shape in shapes(OTHER).items() if name.startswith("down_blocks.1")
    }
    with pytest.raises(BadInput, match="no model for this adapter"):
        require_one_model(mixed)
