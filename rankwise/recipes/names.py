"""Names of what is in an output folder, and how a run may stand: for those who read one without training."""

from __future__ import annotations

RUN_FILE = "run.yaml"
LOCK_FILE = ".lock"
JOB_FILE = ".job"
STATUS_FILE = "status.json"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
PROVENANCE_FILE = "provenance.json"
RANKS_PICTURE = "ranks.png"

RUNNING = "running"
FINISHED = "finished"
STOPPED = "stopped"
"""Asked to, by Ctrl-C."""
FAILED = "failed"
CONFLICT_FILE = "conflict.jsonl"
