"""One tokenizer against the `encodec` package, a recording at a time: `benchmarks/tokenizer_speed.py` in short.

python benchmarks/codec_speed.py --tokenizer DIR [options of tokenizer_speed]
"""

from __future__ import annotations

import sys

from benchmarks.tokenizer_speed import main

if __name__ == "__main__":
    sys.exit(main(["--batch", "1", "--repeats", "15", *sys.argv[1:]]))
