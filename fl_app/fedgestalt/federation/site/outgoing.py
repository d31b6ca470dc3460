"""The last gate at a site: what leaves it is one of our messages, and is written down.

A privacy filter of FLARE (``local/privacy.json``), outside the reach of any job. It checks that a
result is a message that this version sends in that task, field by field, or a sentence about a
fault, and appends a line to ``sent.jsonl`` in the site's store, for the site's own records. Results
of tasks of other software pass: these can only be what the site's class allow list lets in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable

from fedgestalt.errors import ConfigError, SiteError
from fedgestalt.federation.job.wire import BODY, FAULT, FAULT_LIMIT, body, fault_reply
from fedgestalt.federation.site.settings import read_settings
from fedgestalt.federation.tasks import ANSWERS, TASK_PREFIX
from fedgestalt.messages import size_of

SENT_FILE = "sent.jsonl"


class OutgoingGuard(Filter):
    """Refuses results that are not ours; records those that are."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """See the module docstring; a refused result becomes a fault that says so."""
        task = fl_ctx.get_prop(FLContextKey.TASK_NAME, "")
        if not task.startswith(TASK_PREFIX):
            return shareable
        try:
            sent = self._checked(task, shareable)
            self._record(task, sent, fl_ctx)
        except (SiteError, ConfigError) as error:
            self.log_error(fl_ctx, str(error))
            return fault_reply(error)
        except OSError as error:
            return fault_reply(
                SiteError(
                    f"its record of what leaves it cannot be written ({error.strerror})",
                    remedy="free disk space for its store; nothing was sent",
                )
            )
        return shareable

    def _checked(self, task: str, shareable: Shareable) -> dict[str, Any]:
        extra = set(shareable) - {BODY, FAULT, ReservedHeaderKey.HEADERS}
        if extra:
            raise SiteError("its outgoing guard stopped a result with parts that are no message")
        if shareable.get_return_code() not in (None, ReturnCode.OK):
            said = shareable.get(FAULT, "")
            if BODY in shareable or not isinstance(said, str) or len(said) > FAULT_LIMIT:
                raise SiteError("its outgoing guard stopped a fault that is more than a sentence")
            return {"message": "fault", "bytes": size_of(said)}
        answer = ANSWERS.get(task)
        if answer is None or FAULT in shareable:
            raise SiteError(f"its outgoing guard stopped a result that is no answer to {task}")
        fields = answer.from_fields(body(shareable), _stopped).to_fields()
        return {"message": answer.schema, "bytes": size_of(fields)}

    def _record(self, task: str, sent: Mapping[str, Any], fl_ctx: FLContext) -> None:
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        workspace = workspace or fl_ctx.get_engine().get_workspace()
        settings = read_settings(Path(workspace.get_site_config_dir()))
        store = settings.store_folder(fl_ctx.get_identity_name())
        record_sent(store, fl_ctx.get_job_id(), task, sent["message"], sent["bytes"])


def record_sent(store: Path, job: str, task: str, message: str, size: int) -> None:
    """Append a line to the site's own record of what left it.

    Args:
        store: the site's.
        job: its id.
        task: in which task.
        message: what kind.
        size: bytes.

    Raises:
        OSError: it cannot be written.
    """
    store.mkdir(parents=True, exist_ok=True, mode=0o700)
    line = {"time": round(time.time(), 2), "job": job, "task": task}
    with (store / SENT_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "message": message, "bytes": size}) + "\n")


def _stopped(what: str) -> SiteError:
    return SiteError(f"its outgoing guard stopped a result: {what}")
