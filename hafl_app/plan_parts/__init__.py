"""Parts of a training plan, each checked as it is made; standard library only."""
