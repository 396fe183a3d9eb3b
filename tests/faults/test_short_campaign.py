# SPDX-License-Identifier: Apache-2.0
"""The fault campaign in its short form: a few kills, a hanging rank. The whole one is `campaign.py`, a command.

Damaged files, a full disk and a loss that is not a number are in tests/training/test_resume.py.
"""

from collections import Counter

from lives import Campaign
from scenarios import hanging_rank


def test_killed_at_random_instants_nothing_is_lost_and_every_loss_is_the_same(prepared, tmp_path):
    campaign = Campaign(prepared, tmp_path, steps=40, seed=1)
    campaign.run_uninterrupted()
    for number in (1, 2):
        campaign.live_and_die(number)
    campaign.finish()
    assert sum(count for name, count in campaign.tally.items() if name.startswith("SIGKILL")) == 2


def test_a_hanging_rank_is_ended_and_the_run_resumes(prepared, tmp_path):
    tally = Counter()
    hanging_rank(prepared, tmp_path, tally)
    assert tally.total() == 1
