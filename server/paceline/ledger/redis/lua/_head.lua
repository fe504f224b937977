-- In front of every script that reads a ledger's head. The rules are those of paceline/ledger/lease.py.
--
-- A head is a hash of the fields below, numbers in decimal; no hash, no head. Numbers stay under 2^53, where Lua's are
-- exact. Here a head is the list of the fields' values in this order, all strings, or nil.
-- Answers are lists: what became of it, the store's time in µs, the head's values (or nil), and what the script adds.

local FIELDS = {
  'epoch', 'nonce', 'node', 'address', 'seq', 'hash', 'at', 'written_at', 'confirmed_at', 'until', 'base_seq',
  'base_hash', 'lineage', 'form', 'successor', 'snapshot', 'snapshot_seq', 'snapshot_at', 'snapshot_hash',
  'snapshot_digest', 'snapshot_chunks', 'check',
}
local EPOCH, NONCE, NODE, ADDRESS, SEQ, HASH, AT, WRITTEN_AT, CONFIRMED_AT, UNTIL, BASE_SEQ,
  BASE_HASH, LINEAGE, FORM, SUCCESSOR, SNAPSHOT, SNAPSHOT_SEQ, SNAPSHOT_AT, SNAPSHOT_HASH,
  SNAPSHOT_DIGEST, SNAPSHOT_CHUNKS, CHECK = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22

local function int(number)
  return string.format('%.0f', number)
end

local function time()
  local parts = redis.call('TIME')
  return tonumber(parts[1]) * 1000000 + tonumber(parts[2])
end

local function load(key)
  local head = redis.call('HMGET', key, unpack(FIELDS))
  if head[EPOCH] then
    return head
  end
end

-- Puts the named fields of a head that is there.
local function put(key, head, ...)
  local pairs_ = {}
  for _, field in ipairs({...}) do
    pairs_[#pairs_ + 1] = FIELDS[field]
    pairs_[#pairs_ + 1] = head[field]
  end
  redis.call('HSET', key, unpack(pairs_))
end

local function put_all(key, head)
  local pairs_ = {}
  for field, name in ipairs(FIELDS) do
    pairs_[#pairs_ + 1] = name
    pairs_[#pairs_ + 1] = head[field]
  end
  redis.call('HSET', key, unpack(pairs_))
end

local function answer(what, now, head, ...)
  return {what, int(now), head or false, ...}
end

local function owned(head, epoch, nonce)
  return head and head[EPOCH] == epoch and head[NONCE] == nonce
end
