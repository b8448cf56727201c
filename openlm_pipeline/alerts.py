"""Alerts: a line in the log, and where OPENLM_ALERT_WEBHOOK names one, a message to a webhook (Slack's form)."""

import http.client
import json
import logging
import os
import urllib.error
import urllib.request

from openlm_pipeline.errors import ConfigError

WEBHOOK = "OPENLM_ALERT_WEBHOOK"
"""Environment variable with the webhook's address. It is a secret: it is neither logged nor stored."""
_SECONDS = 10
_log = logging.getLogger(__name__)


def send_alert(text: str) -> bool:
    """Log a warning, and post `{"text": ...}` to the webhook if there is one.

    Returns:
        Whether the webhook took it; False without one, or where it can't be reached, which is logged.

    Raises:
        ConfigError: the address is not an http(s) URL.
    """
    _log.warning(text)
    url = os.environ.get(WEBHOOK)
    if not url:
        return False
    if not url.startswith(("https://", "http://")):
        raise ConfigError(f"{WEBHOOK} is not an http(s) address")
    body = json.dumps({"text": text}).encode()
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=_SECONDS):
            return True
    except urllib.error.HTTPError as e:
        _log.warning("the alert webhook answered %s", e.code)
    except (OSError, http.client.HTTPException, ValueError) as e:  # their texts may hold the address
        _log.warning("the alert webhook can't be reached: %s", type(e).__name__)
    return False
