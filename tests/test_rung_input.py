"""A fake score that takes the rung as an input: what a trainer does with one."""

import pytest
import torch
from test_trainer import config, digits_teacher

from emd_fast import EMDTrainer
from emd_fast.config import ConfigError
from emd_fast.train.preview import denoised


def test_a_given_fake_score_takes_the_rungs_of_the_run():
    given = digits_teacher()
    given.take_rungs(3)
    with pytest.raises(ConfigError, match="rungs must be 3, as the given fake score takes, got 2"):
        EMDTrainer(digits_teacher(), config(rungs=2, num_classes=3), fake_score=given)


def test_the_preview_is_that_of_the_last_rung():
    trainer = EMDTrainer(digits_teacher(), config(rungs=2, num_classes=3))
    before = denoised(trainer, 2)["fake_score"]
    for rung, same in ((0, True), (1, False)):
        with torch.no_grad():
            trainer.fake_score.network.rung_embedding.weight[rung] += 1.0
        assert torch.equal(denoised(trainer, 2)["fake_score"], before) == same
