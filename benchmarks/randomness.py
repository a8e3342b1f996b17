"""Is the noise random? Evidence, with records.

make randomness             # or: python benchmarks/randomness.py
make randomness BATTERY=1   # also dieharder on the raw words, half an hour; see battery.py
"""

import argparse
import sys

import battery
import records
import torch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--battery", action="store_true", help="run dieharder on the raw words, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    environment = records.environment()  # as the run begins
    if options.battery:
        print(battery.__doc__)
        records.append("randomness", {**environment, **battery.run()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
