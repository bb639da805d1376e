"""`sdd-lora resize`."""

from sdd_lora.cli.adapters import AdapterFile, Energy, Force, OutputFile, Rank, StoredDtype
from sdd_lora.cli.common import Result, verb


@verb("resize")
def resize(
    file: AdapterFile,
    output: OutputFile,
    rank: Rank = None,
    energy: Energy = None,
    dtype: StoredDtype = None,
    force: Force = False,
) -> Result:
    """Make an adapter smaller, at the least error that a lower rank can have, and say which.

    Examples:

        sdd-lora resize weapons.safetensors -o small.safetensors --rank 1

        sdd-lora resize stack.safetensors -o small.safetensors --energy 0.99
    """
    from sdd_lora.adapter import algebra as compose
    from sdd_lora.adapter.adapter import Adapter, stored_dtype
    from sdd_lora.cli.adapters import check_outputs, line, write
    from sdd_lora.cli.tables import table

    check_outputs(force, output)
    compose.require_one_size(rank, energy)
    adapter = Adapter.load(file)
    result = compose.resize(adapter, rank, energy)
    kohya = write(result.adapter, output, "kohya", dtype.value if dtype else stored_dtype(file))
    rows = [
        [name, f"{adapter.factors[name].rank} → {result.adapter.factors[name].rank}",
         f"{100 * error:.2f} %"]
        for name, error in result.error_of_module.items()
    ]  # fmt: skip
    text = "\n".join(
        [
            table(["module", "rank", "relative error"], rows),
            line(kohya),
            f"relative error in all: {100 * result.error:.2f} %",
        ]
    )
    data = kohya | {
        "relative_error": result.error,
        "modules": {
            name: {"rank": result.adapter.factors[name].rank, "relative_error": error}
            for name, error in result.error_of_module.items()
        },
    }
    return Result(data, text)
