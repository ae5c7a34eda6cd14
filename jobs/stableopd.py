"""StableOPD, from a checkpoint to a better one; the same arguments as ``opd-ray train``.

    python jobs/stableopd.py [--config FILE] [--run-dir DIR] [--resume | --auto-resume] [section.field=value ...]

Without arguments it trains the small embedded student on this machine. On a cluster:

    ray job submit --working-dir . -- python jobs/stableopd.py --run-dir /shared/runs/first --config my.yaml

There --run-dir must be an absolute path that outlives the job: the job runs in a temporary copy of the
working directory. ``--help`` lists every field of the configuration.
"""

from opd_ray.__main__ import main_train

if __name__ == "__main__":
    main_train()
