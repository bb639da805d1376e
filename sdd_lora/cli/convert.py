"""`sdd-lora convert`."""

from typing import Annotated

import typer

from sdd_lora.cli.adapters import AdapterFile, Force, Form, OutputFile, StoredDtype
from sdd_lora.cli.common import Result, verb


@verb("convert")
def convert(
    file: AdapterFile,
    output: OutputFile,
    to: Annotated[
        Form,
        typer.Option(
            "--to",
            help="kohya: the file that everybody loads; peft: diffusers' own; ldm: kohya with LDM "
            "names; attn-procs: old diffusers, attention alone.",
        ),
    ] = Form.kohya,
    dtype: StoredDtype = None,
    force: Force = False,
) -> Result:
    """Give an adapter another dress; what it does stays the same.

    There is no fp8 or int8: an adapter is small already, fp8's three bits of mantissa would cost
    6 % of every factor, and no loader knows a scale for them.

    Examples:

        sdd-lora convert lora.safetensors -o lora-kohya.safetensors

        sdd-lora convert runs/weapons -o weapons.peft.safetensors --to peft --dtype fp32
    """
    from sdd_lora.adapter.adapter import Adapter, stored_dtype
    from sdd_lora.cli.adapters import check_outputs, line, write

    check_outputs(force, output)
    adapter = Adapter.load(file)
    written = write(adapter, output, to.value, dtype.value if dtype else stored_dtype(file))
    return Result(written, line(written))
