# SPDX-License-Identifier: Apache-2.0
"""The fault campaign: kills at random instants, damaged files, a full disk, a hanging rank, a rank that sees NaN.

    python tests/faults/campaign.py              # 50 kills and everything else, about half an hour on two cores
    python tests/faults/campaign.py --kills 5

Required of every fault: the run that resumes has bitwise the uninterrupted run's losses, no checkpoint that was in
force is lost, nothing hangs. Prints a tally; exits with 1 at the first violation. Float32 on CPU, 2 processes.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from corpus import prepare_corpus
from lives import Campaign, Violation
from scenarios import full_disk, nan_rank

from sparsek_megatron.training.run_folder import candidates

DAMAGES = ("bit flip", "bit flip in the settings", "truncation", "missing file", "damaged latest")
STEPS_PER_LIFE = 5  # at most: the run must not end before its lives do


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the kinds and instants of the kills")
    parser.add_argument("--damage-every", type=int, default=5, help="kills between two damaged checkpoints; 0 for none")
    parser.add_argument("--only-kills", action="store_true", help="leave out disk and NaN")
    args = parser.parse_args()
    begun = time.monotonic()
    tally: Counter = Counter()
    with tempfile.TemporaryDirectory(prefix="fault-campaign-") as folder:
        root = Path(folder)
        (root / "prepared").mkdir()
        prepared = prepare_corpus(root / "prepared")
        try:
            kill_campaign(args, prepared, root, tally)
            if not args.only_kills:
                for number, scenario in enumerate((full_disk, nan_rank)):
                    (root / f"scenario{number}").mkdir()
                    scenario(prepared, root / f"scenario{number}", tally)
                    print(f"{scenario.__name__}: done", flush=True)
        except Violation as err:
            print(f"VIOLATION: {err}", flush=True)
            tally["violations"] += 1
    print(f"\ntally after {time.monotonic() - begun:.0f} s:")
    for name, count in sorted(tally.items()):
        print(f"  {count:4d}  {name}")
    return 1 if tally["violations"] else 0


def kill_campaign(args: argparse.Namespace, prepared, root: Path, tally: Counter) -> None:
    """Lives of one run, with a damaged checkpoint now and then."""
    folder = root / "kills"
    folder.mkdir()
    damages = args.kills // args.damage_every if args.damage_every else 0
    steps = STEPS_PER_LIFE * (args.kills + damages) + 10
    campaign = Campaign(prepared, folder, steps=steps, seed=args.seed, tally=tally)
    campaign.run_uninterrupted()
    print(f"uninterrupted run of {steps} steps: done", flush=True)
    done = 0
    for number in range(1, args.kills + 1):
        campaign.live_and_die(number)
        where = f"at step {campaign.last_logged()}, checkpoint {campaign.good}"
        print(f"kill {number} of {args.kills}: {where}", flush=True)
        enough = len(candidates(campaign.save)[0]) >= 2
        if args.damage_every and number % args.damage_every == 0 and enough:
            kind = DAMAGES[done % len(DAMAGES)]
            done += 1
            campaign.damage(kind)
            print(f"  {kind}: passed over, resumed from {campaign.good}", flush=True)
    campaign.hang()
    campaign.finish()


if __name__ == "__main__":
    sys.exit(main())
