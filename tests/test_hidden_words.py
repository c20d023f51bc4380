"""Words and phrases that training hides from the network, and how guidance leads away from prompts without them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIGS

from diffusion.model import prompts
from diffusion.model.condition import rows_away
from diffusion.model.experiment import make_model
from diffusion.model.fields import change, load
from diffusion.runs.draw import warn_of_no_phrase
from experiments.scenes import VOCABULARY

PHRASES = ["dark skin", "light skin", "man", "skin", "woman"]  # ids 2 to 6; 1 is unknown, 0 is no word


def shown(vocabulary):
    """Returns an encoder whose features are the ids that it is given."""
    encoder = prompts.make_words(vocabulary, 8, 12)
    return encoder._replace(encode=lambda params, ids: prompts.Text(ids[..., None], ids))


def test_words_of_a_share_are_hidden_each_alone():
    """In the captions that are not hidden whole: they are read as unknown, and where no word is none is read."""
    ids = np.random.default_rng(0).integers(2, 9, (400, 12))
    ids[:, 9:] = 0
    batch, key = {"text": jnp.asarray(ids), "label": jnp.zeros(400, jnp.int32)}, jax.random.key(1)
    encoder = shown(VOCABULARY)

    def read(dropout, word_dropout):
        return np.asarray(prompts.prompts(encoder, dropout, word_dropout).of_batch(None, batch, key)["pooled"])

    words, captions = read(0.0, 0.3) == 1, read(0.5, 0.0)[:, :1] == 0
    assert abs(words[:, :9].mean() - 0.3) < 4 * (0.3 * 0.7 / 3600) ** 0.5
    assert not words[:, 9:].any() and set(words.sum(axis=1)) > {1, 2, 3, 4}
    assert abs(np.corrcoef(words[:, 0], captions[:, 0])[0, 1]) < 4 / 400**0.5
    np.testing.assert_array_equal(read(0.5, 0.3), np.where(captions, 0, np.where(words, 1, ids)))
    with pytest.raises(ValueError, match=r"condition\.word_dropout is -1\.0: it has to lie in \[0, 1\]"):
        config, _ = load("scenes", CONFIGS)
        make_model(change(config, {"condition.word_dropout": -1.0}), (16, 16, 3), None, None, VOCABULARY)


def test_phrases_of_a_share_are_hidden_and_guidance_leads_away_from_none_of_them():
    ids = np.random.default_rng(0).integers(1, 7, (400, 12))
    batch, key = {"text": jnp.asarray(ids), "label": jnp.zeros(400, jnp.int32)}, jax.random.key(1)
    condition = prompts.prompts(shown(PHRASES), 0.0, phrase_dropout=0.3)
    read = np.asarray(condition.of_batch(None, batch, key)["pooled"])
    phrases = (ids == 2) | (ids == 3)
    np.testing.assert_array_equal(read[~phrases], ids[~phrases])
    assert set(read[phrases]) == {1, 2, 3}
    assert abs(np.mean(read[phrases] == 1) - 0.3) < 4 * (0.3 * 0.7 / phrases.sum()) ** 0.5
    assert condition.rows_of_batch
    np.testing.assert_array_equal(condition.rows_of_batch(batch, key), read)

    def away(condition, *negative):
        return rows_away(condition, condition.read(["woman, dark skin", "man"]), *negative)[:, :2].tolist()

    assert away(condition) == away(condition, None) == [[6, 1], [4, 0]]  # what is left without the phrase
    assert away(condition, "man, light skin") == [[4, 3], [4, 3]]
    assert away(condition, [None, "woman"]) == [[6, 1], [6, 0]]
    assert away(prompts.prompts(shown(PHRASES), 0.1)) == [[0, 0], [0, 0]]  # no prompt
    with pytest.raises(ValueError, match=r"phrase_dropout=0\.1 hides phrases, .* none: set condition\.phrases"):
        prompts.prompts(shown(["dark", "skin"]), 0.1, phrase_dropout=0.1)


def test_prompts_that_guidance_changes_nothing_of_are_reported(caplog):
    condition = prompts.prompts(shown(PHRASES), 0.0, phrase_dropout=0.3)

    def reported(asked, scale, *negative):
        caplog.clear()
        rows = condition.read(asked)
        config, _ = load("scenes", CONFIGS)
        config = change(config, {"sampling.guidance": scale})
        warn_of_no_phrase(condition, config, rows, rows_away(condition, rows, *negative))
        return [record.message.split(":")[0] for record in caplog.records]

    assert reported(["man", "man, dark skin", "", "woman"], 1.7) == [
        "sampling.guidance=1.7 changes nothing of 2 prompts"
    ]
    assert reported(["man"], 1.0) == reported(["man"], 1.7, "") == reported(["man, dark skin", None], 1.7) == []
