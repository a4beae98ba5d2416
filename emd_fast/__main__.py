import sys

from emd_fast.cli.commands import main

sys.exit(main())
