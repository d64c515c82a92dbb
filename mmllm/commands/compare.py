"""Compare two to four runs: the settings that differ, a table, and their curves in one image.

mmllm compare outputs/full outputs/small --out compare.png
mmllm compare outputs/flickr8k benchmarks/runs/flickr8k.jsonl    # a run of somebody else: its metrics.jsonl alone
"""

from pathlib import Path

from mmllm.commands import make_parser
from mmllm.reporting.compare import compare


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("compare", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="directories of runs, or files with their metrics"
    )
    parser.add_argument("--out", type=Path, default="compare.png", metavar="FILE", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    for line in compare(options.runs, options.out):
        print(line)
