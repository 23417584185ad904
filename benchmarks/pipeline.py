"""Pipelines: what the simulator says beside what ranks do, beside the papers' gains, and beside torch's own runtime.

python benchmarks/pipeline.py                   all three parts; each writes results/pipeline_PART.json
python benchmarks/pipeline.py --parts gains     only what is simulated

`waits`   4 ranks whose work is a timed wait: the makespan of every schedule, simulated and measured.
`gains`   steps per second over 1f1b at 1 and 2 times its activations, and of blockwise over breadth-first, simulated.
`runtime` 2 ranks train a small decoder by the same schedule, in turns: this runtime and torch.distributed.pipelining's.
"""

import argparse

import pipeline_gains
import pipeline_runtime
import pipeline_waits
from processes import on_ranks
from record import RESULTS, write_record

PARTS = {"waits": pipeline_waits, "gains": pipeline_gains, "runtime": pipeline_runtime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    for name in options.parts:
        measured = PARTS[name].run(on_ranks)
        print(f"\n{name}\n{PARTS[name].show(measured)}", flush=True)
        print(f"written: {write_record(f'pipeline_{name}', measured).relative_to(RESULTS.parents[1])}", flush=True)


if __name__ == "__main__":
    main()
