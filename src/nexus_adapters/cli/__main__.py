"""`python -m nexus_adapters.cli`, for launchers that start a module."""

import sys

from nexus_adapters.cli import main

sys.exit(main())
