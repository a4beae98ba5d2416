import sys

from emd_fast.cli import main

sys.exit(main())
