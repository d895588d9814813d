"""A stage of a run: shards that are written once, with the same content whichever process makes them.

The shards of a stage are in `<work_dir>/<stage>/<fingerprint>/`. If a setting changes, this stage and the
stages after it use new folders; if it is changed back, the old shards are found again. A shard gets its final
name only when it is complete. `done.json` marks a stage that has all its shards. `settings.json` has what the
fingerprint is a hash of.
"""

from scaledown.run.stage.stage import Stage, StageResult, together

__all__ = ["Stage", "StageResult", "together"]
