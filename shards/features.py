"""The command `python -m shards features`; `feature_job` does the work."""

from __future__ import annotations

from dataclasses import dataclass

from shards.feature_options import FeatureOptions


@dataclass
class FeaturesCommand(FeatureOptions):
    """Run frozen backbones over a data set once and store what they make of it.

    A modality without a backbone, or one that is stored as features already, is copied. An interrupted run goes on
    where it was; finished shards are kept."""

    def run(self) -> None:
        """Write the features. Raises BadInput as `feature_job.write_features` does."""
        from shards.feature_job import write_features  # torch takes seconds to import, and --help waits

        write_features(self)
