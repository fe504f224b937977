-- Keep a part of a snapshot that does not count yet, for a while.
-- KEYS: the head, the snapshot
-- ARGV: the snapshot's name, index, chunk, seconds
-- answer: 1; 0 if the snapshot counts already: this came late, and must not let it expire

if redis.call('HGET', KEYS[1], 'snapshot') == ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 1
