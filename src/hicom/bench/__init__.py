"""What HICom costs beside what it is compared with: times, memory, and the distance to what a machine can do."""
