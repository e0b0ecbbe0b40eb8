"""NSMC, the Naver sentiment movie corpus (https://github.com/e9t/nsmc), as two tasks of lm-evaluation-harness."""
