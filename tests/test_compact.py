"""The short form: short enough, and the same network for any sizes."""

import random

import pytest
import torch
from torch import nn

from convmixer_edu.claims import claim
from convmixer_edu.compact import TWEET, from_text, copy_weights, tweet_model
from convmixer_edu.model import ConvMixer


def sizes():
    """Return 24 random (h, d, k, p, n, rows, columns), half of them with an even kernel."""
    draw = random.Random(7)
    return [(draw.randint(1, 20), draw.randint(1, 4), 2 * draw.randint(1, 5) - trial % 2, draw.randint(1, 4),
             draw.randint(1, 9), draw.randint(2, 5), draw.randint(2, 5)) for trial in range(24)]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("h, d, k, p, n, rows, columns", sizes())
def test_the_tweet_is_the_network(h, d, k, p, n, rows, columns):
    torch.manual_seed(h)
    ours = ConvMixer(h, d, k, p, n)
    for part in ours.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    short, x = copy_weights(tweet_model(h, d, k, p, n), ours), torch.randn(2, 3, p * rows, p * columns)
    for mode in (True, False):  # training first: it moves BatchNorm's statistics, which must move alike
        assert torch.allclose(ours.train(mode)(x), short.train(mode)(x), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), short.state_dict().values()))


def test_it_fits_and_stands_alone():
    assert len(TWEET) <= claim("m-280").number
    assert all(len(line.encode()) == len(line) for line in TWEET.splitlines()), "an ordinary character each"
    assert from_text()(4, 1, 3, 2, 5)(torch.zeros(1, 3, 4, 4)).shape == (1, 5)


def test_blocks_begin_with_weights_of_their_own():
    blocks = tweet_model(8, 3, 3, 2, 5)[3:6]
    assert not torch.equal(blocks[0][0][0].weight, blocks[1][0][0].weight)


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="expected two forms of one network"):
        copy_weights(tweet_model(8, 1, 3, 2, 5), ConvMixer(8, 2, 3, 2, 5))
