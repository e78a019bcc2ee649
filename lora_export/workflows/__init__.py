"""What joins rooms into one job: each module tells a job from beginning to end and leaves the work to the rooms."""
