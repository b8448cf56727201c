"""Real text with a real tokenizer: the same ids as Hugging Face `tokenizers`, and no byte lost."""

import itertools
import unicodedata
from pathlib import Path

from small_dataset import SmallDataset
from tokenizers import Tokenizer

from openlm_pipeline.corpus.reader import RecordReader
from openlm_pipeline.pools import PoolFactory

DOCUMENTS = 300


def test_shards_of_real_text_hold_the_ids_of_hugging_face(
    shared_data: Path, tmp_path: Path, inline: PoolFactory
) -> None:
    reader = RecordReader(str(shared_data / "raw" / "00.jsonl.zst"), on_bad=lambda bad: None)
    texts = [record.text for record in itertools.islice(reader, DOCUMENTS)]
    reader.close()
    source = shared_data / "tokenizers" / "gpt-neox-20b"
    made = SmallDataset(
        tmp_path,
        {
            "tokenizer": {"name": "gpt_neox_20b", "source": str(source)},
            "seq_len": 256,
            "model": {"name": "open_lm_11m"},
            "training": {"global_batch": 256, "lr": 1e-3},
            "milestones": [256],
            "samples_per_shard": 512,
        },
    )
    made.write({"a.jsonl": texts[:200], "b.jsonl": texts[200:]})
    totals = made.run(inline).facts
    made.manifest()

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    expected = [[*encoding.ids, tokenizer.token_to_id("<|endoftext|>")] for encoding in encodings]
    recovered = made.recovered()
    found = [recovered.get(("a.jsonl", n) if n < 200 else ("b.jsonl", n - 200), []) for n in range(DOCUMENTS)]
    cut = [n for n in range(DOCUMENTS) if found[n] != expected[n]]
    assert all(found[n] == expected[n][: len(found[n])] for n in cut)
    assert sum(len(expected[n]) - len(found[n]) for n in cut) == totals["tail_tokens"] <= 256
    for n in sorted(set(range(DOCUMENTS)) - set(cut)):
        text = tokenizer.decode(found[n][:-1], skip_special_tokens=False)
        assert text == unicodedata.normalize("NFC", texts[n])
