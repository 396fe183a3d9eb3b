# SPDX-License-Identifier: Apache-2.0
"""The fault campaign in its short form: a kill, torn files, a hanging rank. The whole one is `campaign.py`, a command.

Damaged files, a full disk and a loss that is not a number are in tests/training/test_resume.py.
"""

from lives import Campaign


def test_killed_and_hung_nothing_is_lost_and_every_loss_is_the_same(prepared, tmp_path):
    campaign = Campaign(prepared, tmp_path, steps=30, save_interval=4, seed=20)
    campaign.run_uninterrupted()
    campaign.live_and_die(1)
    assert campaign.tally == {"SIGKILL: training": 1}
    assert campaign.last_logged() > campaign.good, "logged steps must be taken again"
    campaign.tear()
    campaign.hang()
    campaign.finish()
    assert campaign.tally.total() == 3
