"""`vitrail bench WHAT`: measurements of this machine."""

from vitrail.commands import bench_data
from vitrail.commands.flags import parse
from vitrail.core.errors import UserError


def run(arguments: list[str]) -> int:
    """data: pictures a core prepares each second, beside a plain Pillow pipeline."""
    if not arguments or arguments[0] != "data":
        found = f"{arguments[0]!r} is none" if arguments else "none was named"
        raise UserError(f"vitrail bench measures: data; {found}; give vitrail bench data --data FOLDER.")
    settings = parse(bench_data.Settings, arguments[1:], "bench data", description=bench_data.run.__doc__ or "")
    return bench_data.run(settings)
