"""Signs of life of the ranks: a job never waits without a bound, and says for whom it waited.

watch.py            what this rank says of itself, and the threads that send it and look at the others
board.py            where ranks write it: keys in the store that the ranks met at
judgement.py        when a rank counts as lost or stuck, and the words for it
flight_recorder.py  the last collectives of each rank, where a job is ended that stands still
"""
