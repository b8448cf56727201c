"""Where a number came from: releases that prove it."""
