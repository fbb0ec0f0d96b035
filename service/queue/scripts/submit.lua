#!lua
-- Admit and enqueue one job, or say why not. The input pieces were written just before, in the same pipeline.
-- ARGV: mode ("check" only looks), id, tenant, lane, cost, payload bytes, time to live ms, api, op, options,
--       request id, ms that the record outlives the deadline; limits: tokens (0: what the workers do in so many
--       seconds, at least so many tokens), those seconds, those tokens, bytes, items, tenant share (0: none); the job's
--       tokens to encode, to decode, ms that it takes at least; the workers' tokens a second of encode, of decode
--       (0: unknown).
-- Returns {"ok"} or {"dup", state} or {reason, limit, actual, ms after which to come back}; of a deadline both are ms.
local id, tenant, lane, cost, bytes, ttl, api = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]),
  tonumber(ARGV[7]), ARGV[8]
local max_tokens, queue_s, floor_tokens, max_bytes, max_items, share = tonumber(ARGV[13]), tonumber(ARGV[14]),
  tonumber(ARGV[15]), tonumber(ARGV[16]), tonumber(ARGV[17]), tonumber(ARGV[18])
local to_encode, to_decode, least_ms, encode_rate, decode_rate = tonumber(ARGV[19]), tonumber(ARGV[20]),
  tonumber(ARGV[21]), tonumber(ARGV[22]), tonumber(ARGV[23])

local function drop()
  for i = 7, #KEYS do
    redis.call('UNLINK', KEYS[i])
  end
end

local state = redis.call('HGET', KEYS[1], 'st')
if state then -- the same submit again, after a lost connection
  if not live(state) then
    drop()
  end
  return { 'dup', state }
end

local weight = math.ceil(bytes * 1.25) -- what the allocator takes
local c = redis.call('HMGET', KEYS[3], 'tokens', 'bytes', 'items', 't:' .. tenant, 'encode', 'decode')
local tokens, held_bytes, items, mine = tonumber(c[1]) or 0, tonumber(c[2]) or 0, tonumber(c[3]) or 0,
  tonumber(c[4]) or 0

-- A token to decode may take far longer than one to encode, so waits are sums over both.
local function ms_of(encode, decode)
  return 1000 * ((encode_rate > 0 and encode / encode_rate or 0) + (decode_rate > 0 and decode / decode_rate or 0))
end
local ahead_ms = ms_of(tonumber(c[5]) or 0, tonumber(c[6]) or 0)
local all_ms = ms_of((tonumber(c[5]) or 0) + to_encode, (tonumber(c[6]) or 0) + to_decode)
if max_tokens == 0 then
  max_tokens = floor_tokens
  if all_ms > 0 then
    max_tokens = math.max(floor_tokens, math.floor((tokens + cost) * 1000 * queue_s / all_ms))
  end
end
local token_ms = all_ms > 0 and all_ms / (tokens + cost) or 1000 * queue_s / max_tokens

local why
if tokens > 0 and tokens + cost > max_tokens then -- an empty queue takes an item of any size
  why = { 'queue_full', max_tokens, tokens + cost }
elseif held_bytes + weight > max_bytes then
  why = { 'queue_full', max_bytes, held_bytes + weight }
elseif items + 1 > max_items then
  why = { 'queue_full', max_items, items + 1 }
elseif share > 0 then
  local active = math.max(0, redis.call('HLEN', KEYS[3]) - 5) + (c[4] and 0 or 1)
  local quota = math.floor(max_tokens * math.max(share, 1 / (active + 1)))
  if mine + cost > quota then
    why = { 'queue_full', quota, mine + cost }
  end
end
if why then
  why[4] = math.ceil((tokens + cost - 0.8 * max_tokens) * token_ms)
elseif ahead_ms > 0 and ahead_ms + least_ms > ttl then
  why = { 'would_miss_deadline', ttl, math.ceil(ahead_ms + least_ms), math.ceil(ahead_ms + least_ms - ttl) }
end
if why then
  drop()
  return why
end
if ARGV[1] == 'check' then
  return { 'ok' }
end
for i = 7, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then -- a piece was refused, its pipeline went on
    drop()
    return { 'queue_full_memory', max_bytes, held_bytes + weight, 5000 }
  end
end

local now = now_ms()
local deadline = string.format('%.0f', now + ttl)
local gone = string.format('%.0f', now + ttl + ARGV[12])
local mid = redis.call('XADD', KEYS[2], '*', 'id', id, 'api', api, 'b', ARGV[6])
redis.call('HSET', KEYS[1], 'id', id, 'st', 'queued', 't', tenant, 'lane', lane, 'c', ARGV[5], 'b', ARGV[6], 'dl',
  deadline, 'f', 0, 'n', 0, 'w', '', 'api', api, 'mid', mid, 'op', ARGV[9], 'opt', ARGV[10], 'rid', ARGV[11], 'at',
  ms(now))
redis.call('PEXPIREAT', KEYS[1], gone)
redis.call('HSET', KEYS[4], id, string.format('%d %d %d %d %s %s', cost, to_encode, to_decode, weight, gone, tenant))
redis.call('HINCRBY', KEYS[3], 'tokens', ARGV[5])
redis.call('HINCRBY', KEYS[3], 'encode', to_encode)
redis.call('HINCRBY', KEYS[3], 'decode', to_decode)
redis.call('HINCRBY', KEYS[3], 'bytes', weight)
redis.call('HINCRBY', KEYS[3], 'items', 1)
redis.call('HINCRBY', KEYS[3], 't:' .. tenant, ARGV[5])
return { 'ok' }
