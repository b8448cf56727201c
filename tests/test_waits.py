"""A wait of more than a few seconds says what for, once a minute for each kind."""

import time

from openlm_pipeline import waits
from openlm_pipeline.waits import waiting_for


def test_only_a_long_wait_is_told_and_not_again_at_once(monkeypatch, caplog):
    monkeypatch.setattr(waits, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(waits, "_said", {})
    with waiting_for("nothing"):
        pass
    for name in ("first", "second"):
        with waiting_for(f"the {name} file", "files"):
            time.sleep(0.2)
    with waiting_for("another thing"):
        time.sleep(0.2)
    assert caplog.messages == ["waiting for the first file", "waiting for another thing"]
