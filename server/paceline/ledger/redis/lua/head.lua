-- The head, and the store's time.
-- KEYS: the head
-- ARGV: none
-- answer: ok, now, head

return answer('ok', time(), load(KEYS[1]))
